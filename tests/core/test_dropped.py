"""A dropped window changes nothing: parameters, buffers, optimizer, scheduler, plugins; and the run stops in time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults.non_finite import Still
from orbit.core import NonFiniteGradientError, Plugin
from orbit.engine import Engine
from orbit.plugin import EMA, CheckpointingHook, EarlyStopping, LoggingHook, Warmup
from tests import tiny


class Poisoned(nn.Module):
    """The tiny model, with batch norm; its loss or a gradient is `poison` at some micro-batches."""

    def __init__(self, kind: str, at: set[int]) -> None:
        super().__init__()
        self.inner, self.kind, self.at, self.calls = tiny.model(), kind, at, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        hurt = self.training and self.calls in self.at
        if hurt and self.kind == "input":
            x = x.clone().fill_(math.nan)
        out = self.inner(x)
        if hurt and self.kind == "loss":
            out = out * math.nan
        if hurt and self.kind == "gradient":
            out.register_hook(lambda grad: grad * math.inf)
        return out


def run(
    model: nn.Module, watch: Still, scaled: bool, folder: Path | None = None, epochs: int = 2, **options: Any
) -> Engine:
    optimizer = tiny.optimizer(model)
    plugins: list[Plugin] = [
        EMA(0.9),
        Warmup(5),
        LoggingHook(2),
        EarlyStopping("train_loss"),
        watch,
    ]
    if folder is not None:
        plugins.append(CheckpointingHook(interval=1, path=folder, keep_previous=None))
    engine = Engine(
        model, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), plugins, device="cpu",
        gradient_accumulation_steps=2, mixed_precision="fp16" if scaled else None, **options,
    )  # fmt: skip
    for _ in engine.train(tiny.loader(), num_epochs=epochs):
        engine.auto_update()
    return engine


@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_dropped_window_changes_nothing(kind: str, scaled: bool) -> None:
    """Micro-batches 4 and 9 close and open a window."""
    watch = Still()
    engine = run(Poisoned(kind, {4, 9}), watch, scaled, max_non_finite_grad_retries=1)
    assert watch.differences == [None, None]
    assert engine.global_step == 8 - 2
    assert all(tensor.isfinite().all() for tensor in engine.model.state_dict().values())
    if scaled:
        assert engine.grad_scaler is not None
        assert engine.grad_scaler.get_scale() == 65536 / 4, "halved at each"


@pytest.mark.parametrize("retries", [None, 2])
@pytest.mark.parametrize("kind", ["input", "gradient"])
def test_the_last_good_checkpoint_is_finite_and_loads(tmp_path: Path, kind: str, retries: int | None) -> None:
    """From micro-batch 5 on, in the third window, everything is broken."""
    watch = Still()
    with pytest.raises(NonFiniteGradientError):
        run(Poisoned(kind, set(range(5, 99))), watch, False, tmp_path, max_non_finite_grad_retries=retries)
    assert len(watch.differences) == (retries or 0)
    again = run(Poisoned("none", set()), Still(), False, tmp_path)
    assert again.global_step == 8
    states = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("checkpoint_step_*.pt"))]
    assert len(states) == 8
    assert all(
        t.isfinite().all() for state in states for part in ("model", "EMA") for t in state[part].values()
    )


def test_a_scaler_gives_up_too() -> None:
    """What no scale mends is an error once the scale has come down to 1."""
    with pytest.raises(NonFiniteGradientError, match="not finite first in"):
        run(Poisoned("loss", set(range(5, 999))), Still(), True, epochs=8, max_non_finite_grad_retries=2)

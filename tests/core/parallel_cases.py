"""What the tests of several processes run on every rank (and, with one, in the test's own process)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook

TOGETHER = 12  # samples of all ranks in a micro-batch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def data(samples: int = 50) -> TensorDataset:
    made = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=made)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=made))


class Losses(Plugin):
    """The loss of every step, over all ranks."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_after_step(self, trainer: Any) -> None:
        mean = trainer.step_info["loss"]
        weight = len(trainer.batch[1]) if not trainer.is_padding else 0
        pairs = [(mean.item() if mean is not None else 0.0, float(weight))]
        if trainer.team is not None:
            from orbit.core.ranks import everyones

            pairs = [pair for part in everyones(pairs) for pair in part]
        self.seen.append(math.fsum(loss * w for loss, w in pairs) / math.fsum(w for _, w in pairs))


def engine(parallel: Any, plugins: list[Any], model: nn.Module | None = None, **kwargs: Any) -> Engine:
    torch.manual_seed(0)
    model = Net() if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    options: dict[str, Any] = {"grad_clip_norm": 1.0, "device": "cpu", **kwargs}
    return Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        plugins=plugins,
        parallel=parallel if runtime.world_size() > 1 else None,
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=TOGETHER // runtime.world_size(), shuffle=True)


def train(
    parallel: str, folder: str | None, steps: int, adapters: bool = False, **hook: Any
) -> dict[str, Any]:
    """Losses of the steps trained here, and the whole model and optimizer after them."""
    losses, plugins = Losses(), list[Plugin]()
    if folder is not None:
        plugins.append(
            CheckpointingHook(interval=5, path=Path(folder), keep_previous=None, exit_signals=[], **hook)
        )
    if adapters:
        from orbit.plugin import LoRA

        plugins.append(LoRA(target_names=["up", "down"], r=2, alpha=4))
    run = engine(parallel, [losses, *plugins], gradient_accumulation_steps=1)
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=steps):
        run.auto_update()
    state = run.state_dict()
    return {
        "losses": losses.seen,
        "model": state["model"],
        "optimizer": state["optimizer"]["state"],
        "step": run.step,
        "metrics": dict(run.metrics),
        "trains": sum(p.requires_grad for p in run.model.parameters()),
        "pid": os.getpid(),
    }

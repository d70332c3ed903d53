from __future__ import annotations

import io
import math

import pytest
from rich.console import Console
from torch import nn

from orbit.engine import Engine
from orbit.plugin import Mentor
from tests import tiny


def advice(train: list[float], val: list[float] | None = None, **options: float) -> list[str]:
    """What Mentor says to a history of losses; also checks the line it prints an epoch."""
    out = io.StringIO()
    mentor = Mentor(console=Console(file=out, width=200), **options)  # type: ignore[arg-type]
    engine = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=[mentor], device="cpu")
    mentor.on_before_train(engine)
    for epoch, loss in enumerate(train):
        engine.state.epoch = epoch
        engine.metrics["train_loss"] = loss
        if val is not None:
            engine.metrics["val_loss"] = val[epoch]
        mentor.on_after_epoch(engine)
    lines = out.getvalue().splitlines()
    assert f"epoch {len(train)}  step 0  train_loss {train[-1]:.4f}" in "\n".join(lines)
    assert len(lines) == len(train) + len(mentor.advice)
    return mentor.advice


def test_a_healthy_run_gets_no_advice() -> None:
    assert advice([3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 2.1, 1.8, 1.6, 1.5]) == []


def test_divergence() -> None:
    assert "2.5 times its best" in advice([2.0, 1.0, 2.5])[0]
    assert "loss is nan" in advice([2.0, math.nan])[0]


def test_stagnation() -> None:
    assert "has not fallen for 3 epochs" in advice([2.0, 1.0, 1.0, 1.0, 1.0], patience=3)[0]
    assert advice([2.0, 1.0, 1.0, 0.9], patience=3) == []


def test_overfitting() -> None:
    assert "validation loss rises" in advice([3.0, 2.0, 1.5], [1.0, 1.1, 1.2])[0]


@pytest.mark.parametrize("options", [{"patience": 0}, {"divergence_threshold": 1.0}])
def test_bad_arguments(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Mentor"):
        Mentor(**options)  # type: ignore[arg-type]


def test_it_prints_in_a_real_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model()
    Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), device="cpu").run(
        tiny.loader(), tiny.loader(20), num_epochs=2
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "epoch 2  step 14" in lines[1]
    assert "val_acc" in lines[1]

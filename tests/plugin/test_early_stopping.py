from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import EarlyStopping, Plugin
from tests import tiny


def epochs_until_stop(values: list[float | None], **options: Any) -> int:
    """Feed one metric value an epoch; how many epochs ran. None leaves the metric out."""
    stopping = EarlyStopping(**options)
    engine = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=[stopping], device="cpu")
    engine.optimizer = tiny.optimizer(engine.model)
    for _ in engine.train(tiny.loader(8), num_epochs=len(values)):
        engine.auto_update()
        value = values[engine.epoch]
        if value is not None:
            engine.metrics[stopping.monitor] = value
    return engine.epoch + 1


def test_an_improving_accuracy_is_not_stopped() -> None:
    rising = [0.1 * n for n in range(1, 9)]
    assert epochs_until_stop(rising, monitor="val_acc", patience=2) == 8


def test_it_stops_after_patience_epochs_without_improvement() -> None:
    assert epochs_until_stop([3.0, 2.0, 2.0, 2.5, 1.0, 1.0], monitor="val_loss", patience=2) == 4
    assert epochs_until_stop([0.5, 0.4, 0.6, 0.5, 0.4, 0.3], monitor="val_acc", patience=3) == 6
    assert epochs_until_stop([3.0, 2.9, 2.8, 2.7], monitor="val_loss", patience=2, min_delta=0.5) == 3


def test_epochs_without_the_metric_do_not_count_and_nan_never_improves() -> None:
    assert epochs_until_stop([2.0, None, None, 2.0, None, 2.0, 2.0], patience=2) == 6
    assert epochs_until_stop([math.nan, math.nan, math.nan], patience=2) == 2


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_acc", "max"),
        ("accuracy", "max"),
        ("val/F1", "max"),
        ("top5_acc", "max"),
        ("val_loss", "min"),
        ("vacancy", "min"),
    ],
)
def test_the_direction_is_inferred_from_the_name(name: str, mode: str) -> None:
    assert EarlyStopping(name).mode == EarlyStopping(name, mode="auto").mode == mode
    assert EarlyStopping(name, mode="max").mode == "max"


def test_a_metric_that_never_came_is_pointed_out() -> None:
    with pytest.warns(
        UserWarning, match="never saw 'val_lss': metrics are .'train_loss'.; evaluate in the loop"
    ):
        epochs_until_stop([None, None], monitor="val_lss")


@pytest.mark.parametrize("options", [{"mode": "up"}, {"patience": 0}, {"min_delta": -1.0}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="EarlyStopping"):
        EarlyStopping(**options)


def test_it_says_who_stopped_and_why() -> None:
    class Reason(Plugin):
        seen: Any = None

        def on_after_train(self, trainer: Any) -> None:
            self.seen = trainer.state.stop

    reason = Reason()
    stopping = EarlyStopping("train_loss", mode="max", patience=1)  # the loss falls, so "max" stops at once
    engine = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=[stopping, reason], device="cpu")
    engine.optimizer = tiny.optimizer(engine.model)
    engine.run(tiny.loader(), num_epochs=9)
    assert reason.seen[0] == "EarlyStopping"
    assert "train_loss has not improved for 1 epochs" in reason.seen[1]


def test_a_stopped_run_that_is_resumed_stays_stopped(tmp_path: Path) -> None:
    bodies = []
    for _ in range(2):
        engine = Engine(
            tiny.model(), None, nn.CrossEntropyLoss(), plugins=[EarlyStopping("fixed", patience=2)], device="cpu",
            checkpoint_dir=tmp_path,
        )  # fmt: skip
        engine.optimizer = tiny.optimizer(engine.model)
        bodies.append(0)
        for _ in engine.train(tiny.loader(8), num_epochs=9):
            bodies[-1] += 1
            engine.auto_update()
            engine.metrics["fixed"] = 1.0
    assert bodies == [3, 0]
    assert engine.state.stop is not None
    assert engine.state.stop[0] == "EarlyStopping"


def test_a_run_without_an_epochs_end_is_judged_by_its_evaluations(caplog: pytest.LogCaptureFixture) -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield from tiny.loader()

    class Still(tiny.Trainer):
        def build_optimizer(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), lr=0.0)

        def build_lr_scheduler(self) -> None:
            return None

        def build_val_loader(self) -> Any:
            return tiny.loader()

    stopping = EarlyStopping(patience=2, evaluations=True)
    trainer = Still(40, [stopping], Endless(), eval_interval=3)
    trainer.train()
    assert trainer.step == 9, "the first evaluation is the best, and two more are endured"
    assert "evaluations" in str(trainer.state.stop)
    trainer = Still(12, [EarlyStopping(patience=2)], Endless(), eval_interval=3)
    trainer.train()
    assert trainer.step == 12
    assert "EarlyStopping(evaluations=True)" in caplog.text

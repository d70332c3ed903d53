"""A script with several train() calls is resumed in the one that was interrupted; a finished run is left as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults.compare import difference
from orbit.engine import Engine
from orbit.plugin import EMA, CheckpointingHook, Mentor, Plugin
from tests import tiny


class Interrupt(Exception):
    pass


class InterruptAt(Plugin):
    """Raise at a micro-batch, counted over the whole run."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_before_batch(self, trainer: Any) -> None:
        if trainer.state.micro_step == self.at:
            raise Interrupt


def hooks(folder: Path, at: int | None) -> list[Plugin]:
    return [CheckpointingHook(interval=2, path=folder), EMA(0.9), Mentor(verbose=False), InterruptAt(at)]


def by_engine(folder: Path, at: int | None = None, calls: int = 3) -> Engine:
    """Each call trains 2 epochs of 7 micro-batches, windows of 2: 8 steps. The data are of one length."""
    torch.manual_seed(4)
    model = tiny.model()
    optimizer = tiny.optimizer(model)
    engine = Engine(
        model, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), hooks(folder, at), device="cpu",
        gradient_accumulation_steps=2,
    )  # fmt: skip
    for _ in range(calls):
        for _ in engine.train(tiny.loader(), num_epochs=2):
            engine.auto_update()
        torch.rand(3)  # what a script draws between two calls
    return engine


def by_trainer(folder: Path, at: int | None = None, calls: int = 3) -> tiny.Trainer:
    torch.manual_seed(4)
    trainer = tiny.Trainer(max_steps=8, plugins=hooks(folder, at), gradient_accumulation_steps=2)
    for call in range(calls):
        trainer.max_steps = 8 * (call + 1)
        trainer.train()
        torch.rand(3)
    return trainer


FACES = pytest.mark.parametrize("script", [by_engine, by_trainer])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The state at the end of the uninterrupted script."""
    return cache(lambda script, calls: script(tmp_path_factory.mktemp("whole"), calls=calls).state_dict())


@FACES
@pytest.mark.parametrize("at", [5, 18, 25])
def test_the_interrupted_call_goes_on_and_those_before_it_are_passed_over(
    tmp_path: Path,
    script: Callable[..., Any],
    at: int,
    whole: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Calls begin at micro-batches 1, 15 and 29 under Engine, at 1, 17 and 33 under BaseTrainer."""
    with pytest.raises(Interrupt):
        script(tmp_path / "run", at)
    caplog.clear()
    caplog.set_level(logging.WARNING)
    resumed = script(tmp_path / "run")
    assert difference(resumed.state_dict(), whole(script, 3)) is None
    passed = [record.getMessage() for record in caplog.records]
    assert len(passed) == (at == 25), "at 18 the newest checkpoint is still the first call's last"
    assert all(
        "train() call 1 of this run was over when the checkpoint was saved in call 2" in m for m in passed
    )


@FACES
def test_a_finished_run_is_left_as_it_is(
    tmp_path: Path, script: Callable[..., Any], whole: Callable[..., Any]
) -> None:
    """And goes on when the script asks for more."""
    first = script(tmp_path, calls=2)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint_*")}
    again = script(tmp_path, calls=2)
    assert difference(again.state_dict(), first.state_dict()) is None
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoint_*")} == files
    more = script(tmp_path, calls=3)
    assert difference(more.state_dict(), whole(script, 3)) is None


def test_what_is_loaded_by_hand_is_gone_on_with_by_the_next_call(
    tmp_path: Path, whole: Callable[..., Any]
) -> None:
    """In another script, say: it has no earlier calls."""
    with pytest.raises(Interrupt):
        by_engine(tmp_path / "run", at=25, calls=2)
    model = tiny.model()
    optimizer = tiny.optimizer(model)
    engine = Engine(
        model, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), [EMA(0.9), Mentor(verbose=False)],
        device="cpu", gradient_accumulation_steps=2,
    )  # fmt: skip
    engine.load(tmp_path / "run")
    for _ in engine.train(tiny.loader(), num_epochs=2):
        engine.auto_update()
    assert difference(engine.state_dict()["model"], whole(by_engine, 2)["model"]) is None
    assert (engine.global_step, engine.state.call) == (16, 2)
    for _ in engine.train(tiny.loader()):
        engine.auto_update()
    assert (engine.global_step, engine.state.call) == (20, 3)

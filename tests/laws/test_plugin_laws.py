"""Laws that every plugin keeps: both faces, any position, save and resume, on_close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import orbit.plugin
from orbit.engine import Engine
from orbit.plugin import Plugin
from tests import tiny
from tests.laws.plugins import PACKAGES, PLUGINS, ROWS
from tests.ranks import on_ranks

LAW = pytest.mark.parametrize("name", PLUGINS)
FACES = pytest.mark.parametrize("face", ["engine", "trainer"])


def test_every_plugin_is_in_the_table() -> None:
    other = ("Plugin", "BaseHook", "EmaHook", "Tracker", "MetricError")
    public = {name for name in orbit.plugin.__all__ if name not in other}
    assert public == set(ROWS)


@pytest.mark.parametrize("name", PACKAGES)
def test_trackers_whose_package_is_not_here_are_left_out(name: str) -> None:
    if name not in PLUGINS:
        pytest.skip(f"{name}: {PACKAGES[name]} is not installed: pip install {PACKAGES[name]}")
    assert ROWS[name] is PLUGINS[name]


class StopAt(Plugin):
    """Take the state at a step boundary and leave."""

    priority = 1000

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: Any = None

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            self.state = trainer.state_dict()
            trainer.stop("test", "half way")


def run(face: str, plugins: list[Plugin], state: Any = None) -> nn.Module:
    torch.manual_seed(5)
    if face == "trainer":
        trainer = tiny.Trainer(max_steps=10, plugins=plugins)
        if state is not None:
            trainer.load_state_dict(state)
        trainer.train()
        return trainer.model
    model = tiny.model()
    optimizer = tiny.optimizer(model)
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), plugins, device="cpu")
    if state is not None:
        engine.load_state_dict(state)
    for _ in engine.train(tiny.loader(), num_epochs=2):
        engine.auto_update()
    return model


@LAW
@FACES
def test_a_resumed_run_with_the_plugin_is_the_uninterrupted_one(face: str, name: str, tmp_path: Path) -> None:
    whole = run(face, [PLUGINS[name](tmp_path / "a")])
    stop = StopAt(3)
    run(face, [PLUGINS[name](tmp_path / "b"), stop])
    torch.save(stop.state, tmp_path / "state.pt")
    resumed = run(face, [PLUGINS[name](tmp_path / "c")], torch.load(tmp_path / "state.pt", weights_only=True))
    assert tiny.same(resumed, whole)


@FACES
def test_the_position_in_the_list_changes_nothing(face: str, tmp_path: Path) -> None:
    """All of them in one run: forwards and backwards have every two in both orders."""
    first = run(face, [PLUGINS[name](tmp_path / "first") for name in PLUGINS])
    last = run(face, [PLUGINS[name](tmp_path / "last") for name in reversed(PLUGINS)])
    assert tiny.same(first, last)


@LAW
def test_evaluation_inside_changes_nothing(name: str, tmp_path: Path) -> None:
    models = []
    for evaluates in (False, True):
        torch.manual_seed(5)
        model = tiny.model()
        plugins = [PLUGINS[name](tmp_path / str(evaluates))]
        engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=plugins, device="cpu")
        for _ in engine.train(tiny.loader(), num_epochs=2):
            engine.auto_update()
            if evaluates and engine.batch_idx % 3 == 0:
                for _ in engine.eval(tiny.loader(20)):
                    engine.auto_update()
                    engine.log({"seen": engine.batch_idx})
        models.append(model)
    assert tiny.same(*models)


@LAW
def test_a_run_can_be_left_and_begun_again(name: str, tmp_path: Path) -> None:
    """on_close gives back what on_before_train took, also when the body leaves early or raises."""
    model = tiny.model()
    plugin = PLUGINS[name](tmp_path)
    engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")
    for _ in engine.train(tiny.loader()):
        engine.auto_update()
        break
    with pytest.raises(KeyError), engine:
        for _ in engine.train(tiny.loader()):
            raise KeyError
    for _ in engine.train(tiny.loader()):
        engine.auto_update()
    assert engine.global_step >= 4


@FACES
def test_on_two_ranks(face: str, tmp_path: Path) -> None:
    """All plugins at once under DDP: any order, resumed like uninterrupted, and the ranks stay one model."""
    one, other = on_ranks("tests.laws.ranks_cases:laws", 2, face, str(tmp_path), seconds=120.0)
    for way in ("first", "last", "resumed"):
        for key, value in one["first"].items():
            assert torch.equal(one[way][key], value), (way, key)
            if "running" not in key and "num_batches" not in key:  # batch norm's are each rank's own
                assert torch.equal(other[way][key], value), (way, key)

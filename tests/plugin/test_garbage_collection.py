"""The collector runs at the steps of the plan, at no other time, and afterwards as before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from torch import nn

from orbit.engine import Engine
from orbit.plugin import GarbageCollection
from tests import tiny


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations collected, in order."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def engine(plugin: GarbageCollection) -> Engine:
    model = tiny.model()
    return Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")


def test_it_runs_at_its_steps_and_at_no_other_time(collections: list[int]) -> None:
    trainer = engine(GarbageCollection(3))
    threshold = gc.get_threshold()
    gc.set_threshold(1)  # left alone, it would run all the time
    try:
        for _ in trainer.train(tiny.loader()):
            if trainer.batch_idx == 0:
                collections.clear()
            assert not gc.isenabled()
            trainer.auto_update()
    finally:
        gc.disable()
        ran = list(collections)
        gc.set_threshold(*threshold)
        gc.enable()
    assert ran[:3] == [1, 1, 2], "after steps 3 and 6, and at the epoch's end"


@pytest.mark.parametrize("enabled", [True, False])
def test_on_every_way_out_it_is_as_before(enabled: bool) -> None:
    trainer = engine(GarbageCollection(3))
    if not enabled:
        gc.disable()
    try:
        for _ in trainer.train(tiny.loader()):
            break
        assert gc.isenabled() is enabled
        with pytest.raises(KeyError), trainer:
            for _ in trainer.train(tiny.loader()):
                raise KeyError
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_an_interval_outside_its_range() -> None:
    with pytest.raises(ValueError, match="interval=0"):
        GarbageCollection(0)

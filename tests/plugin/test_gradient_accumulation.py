from __future__ import annotations

import pytest
from torch import nn

from orbit.engine import Engine
from orbit.plugin import GradientAccumulation
from tests import tiny


def test_it_steps_once_a_window_and_closes_the_last_one() -> None:
    model = tiny.model()
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[GradientAccumulation(3)], device="cpu"
    )
    stepped = []
    for _ in engine.train(tiny.loader(56), num_epochs=2):  # seven micro-batches
        engine.auto_update()
        stepped.append(engine.global_step)
    assert stepped == [0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 6]


def test_two_different_numbers_are_refused() -> None:
    model = tiny.model()
    engine = Engine(
        model,
        tiny.optimizer(model),
        plugins=[GradientAccumulation(3)],
        device="cpu",
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match="contradict each other"):
        engine.build()


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_bad_numbers(steps: int) -> None:
    with pytest.raises(ValueError, match="GradientAccumulation"):
        GradientAccumulation(steps)

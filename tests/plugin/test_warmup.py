from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import Plugin, Warmup
from tests import tiny


class Rates(Plugin):
    """The rate that is logged of every step."""

    priority = 1000

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_after_optimizer_step(self, trainer: Any) -> None:
        self.logged.append(trainer.step_info["lr"][0])


class Recording(torch.optim.SGD):
    """Its step() calls that of SGD, which torch wraps in hooks too, once somebody has made a plain SGD."""

    rates: list[float]

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(warmup: Warmup, *, schedule: Any = None, epochs: int = 2, accumulation: int = 1) -> list[float]:
    """The rate of each of seven steps an epoch, from 0.1."""
    model, seen = tiny.model(), Rates()
    torch.optim.SGD(model.parameters())
    optimizer = Recording(model.parameters(), lr=0.1)
    optimizer.rates = []
    engine = Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        None if schedule is None else schedule(optimizer),
        [seen, warmup],
        device="cpu",
        gradient_accumulation_steps=accumulation,
    )
    for _ in engine.train(tiny.loader(), num_epochs=epochs):
        engine.auto_update()
    assert seen.logged == optimizer.rates
    assert not optimizer._optimizer_step_pre_hooks
    return optimizer.rates


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1, 1]),
        ("constant", [0, 0, 0, 0, 1]),
        ("cosine", [(1 - math.cos(math.pi * k / 4)) / 2 for k in range(1, 5)] + [1]),
        ("noam", [0.25, 0.5, 0.75, 1, (4 / 5) ** 0.5]),
    ],
)
def test_the_rate_of_every_step(mode: str, expected: list[float]) -> None:
    assert rates(Warmup(4, mode=mode))[:5] == pytest.approx([0.1 * f for f in expected])
    floored = rates(Warmup(4, mode=mode, min_lr=0.02))[:5]
    assert floored == pytest.approx([0.02 + 0.08 * f for f in expected])


def exponential(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # computes each rate from the last one


def test_a_scheduler_goes_on_undisturbed() -> None:
    alone = [0.1 * 0.5**k for k in range(14)]
    assert rates(Warmup(4), schedule=exponential) == pytest.approx(
        [lr * min(1, (k + 1) / 4) for k, lr in enumerate(alone)]
    )


def test_epochs_are_counted_in_optimizer_steps() -> None:
    assert rates(Warmup(warmup_epochs=1))[:8] == pytest.approx([0.1 * min(1, k / 7) for k in range(1, 9)])
    assert rates(Warmup(warmup_epochs=0.5), accumulation=2)[:3] == pytest.approx([0.05, 0.1, 0.1])
    unsized = (batch for batch in tiny.loader())
    engine = Engine(
        tiny.model(), tiny.optimizer(tiny.model()), plugins=[Warmup(warmup_epochs=1)], device="cpu"
    )
    with pytest.raises(ValueError, match="the loader has no length; give warmup_steps"):
        next(engine.train(unsized))


def test_a_step_that_raises_leaves_the_rate_as_it_was() -> None:
    class Raising(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise KeyError

    model = tiny.model()
    optimizer = Raising(model.parameters(), lr=0.1)
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[Warmup(4)], device="cpu")
    with pytest.raises(KeyError):
        engine.run(tiny.loader(), num_epochs=1)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"warmup_steps": 1, "warmup_epochs": 1},
        {"warmup_steps": 0},
        {"warmup_steps": 1.5},
        {"warmup_epochs": 0},
        {"warmup_steps": 3, "mode": "exponential"},
        {"warmup_steps": 3, "min_lr": -1},
    ],
)
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Warmup\("):
        Warmup(**arguments)

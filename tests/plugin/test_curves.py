"""How often the rules are wrong: on simulated curves, where the truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from orbit.plugin.curves import Point, beginning, diverged, flat, overfits, summary, swings

HEALTHY: dict[str, Callable[[int], float]] = {
    "exponential": lambda i: 0.3 + 2 * math.exp(-i / 8),
    "small rate": lambda i: 2.0 * 0.995**i,
    "smaller rate": lambda i: 2.0 * 0.998**i,
    "power law": lambda i: 3.0 * (i + 1) ** -0.15,
    "fine-tuning": lambda i: 1.2 + 0.5 * math.exp(-i / 3) - 0.01 * i,
    "to zero": lambda i: 2.3 * math.exp(-i / 4),
}
RUNS, EPOCHS = 60, 40


def noisy(curve: Callable[[int], float], noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [curve(i) * (1 + noise * draw.gauss(0, 1)) for i in range(EPOCHS)]


def alarms(train: list[float], val: list[float]) -> set[str]:
    """Everything that is said in the course of a run."""
    said = set()
    for n in range(2, len(train) + 1):
        points = [Point(value) for value in train[:n]]
        found = {
            "divergence": diverged(points, 2.0),
            "plateau": flat(points, 3, 1e-4),
            "oscillation": swings(points),
            "overfitting": overfits(train[:n], val[:n]),
        }
        said |= {kind for kind, evidence in found.items() if evidence is not None}
    return said


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize(("noise", "most"), [(0.0, 0.0), (0.002, 0.02), (0.01, 0.05), (0.03, 0.1)])
def test_a_healthy_run_is_hardly_ever_alarmed(name: str, noise: float, most: float) -> None:
    """Share of runs of 40 epochs in which anything at all is said, at this noise of an epoch's loss."""
    curve = HEALTHY[name]
    false = sum(
        bool(alarms(noisy(curve, noise, seed), [1.1 * v + 0.05 for v in noisy(curve, noise, seed + 999)]))
        for seed in range(RUNS)
    )
    assert false / RUNS <= most


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01])
def test_each_disease_is_seen(noise: float) -> None:
    sick: dict[str, tuple[Callable[[int], float], Callable[[int], float]]] = {
        "divergence": (lambda i: 2.0 * math.exp(-i / 5) + 0.5 + 0.02 * math.exp(i / 7), lambda i: 1.0),
        "plateau": (lambda i: 0.5 + 2.0 * math.exp(-i), lambda i: 1.0),
        "oscillation": (lambda i: 1.0 + 0.6 * math.sin(2.1 * i) - 0.001 * i, lambda i: 1.0),
        "overfitting": (lambda i: 2.0 * 0.9**i, lambda i: 1.0 + 0.8 * math.exp(-i / 3) + 0.02 * i),
    }
    for kind, (train, val) in sick.items():
        seen = sum(kind in alarms(noisy(train, noise, s), noisy(val, noise, s + 999)) for s in range(20))
        assert seen >= 19, kind


def test_one_bad_batch_or_a_lucky_first_one_is_no_divergence() -> None:
    draw = random.Random(0)
    calm = [1.0 + 0.1 * draw.gauss(0, 1) for _ in range(49)]
    assert diverged([Point(2.3), Point(0.001), Point(0.005)], 2.0) is None  # noise near 0
    assert diverged([summary(calm), summary([*calm, 1e6])], 2.0) is None
    assert diverged([summary(calm), summary([3 * loss for loss in calm])], 2.0) is not None
    losses = [[draw.expovariate(1.0) for _ in range(50)] for _ in range(300)]  # of one sample each
    assert sum(bool(beginning(window, 2.0)) for window in losses) <= 6


def test_losses_under_zero() -> None:
    down = [Point(-float(n)) for n in range(10)]
    assert diverged(down, 2.0) is None
    assert diverged([*down, Point(-6.0)], 2.0) is None
    assert diverged([*down, Point(5.0)], 2.0) == {"loss": 5.0, "best": -9.0}

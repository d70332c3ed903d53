"""seed_everything: the same numbers in this process and in a loader's workers; seed_worker: others in each worker."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from orbit.core import rng
from orbit.core.rng import seed_everything, seed_worker


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_the_same_seed_gives_the_same_numbers() -> None:
    assert seed_everything(7) == 7
    first = draws()
    assert draws() != first
    seed_everything(7)
    assert draws() == first
    seed_everything(8)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


class Draws(Dataset[Any]):
    """Each sample is what the three global generators give in its worker."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[float]:
        return draws()


def test_workers_follow_the_seed_and_differ_from_each_other_and_between_epochs() -> None:
    def two_epochs() -> list[list[float]]:
        loader = DataLoader(Draws(), batch_size=None, num_workers=2)
        return [sample for _ in range(2) for sample in loader]

    seed_everything(3)
    first = two_epochs()
    seed_everything(3)
    assert two_epochs() == first
    for column in zip(*first, strict=True):
        assert len(set(column)) == len(first)


class Shift:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)


class Keeps(Dataset[Any]):
    """Each sample is what the dataset's own generators give."""

    def __init__(self) -> None:
        self.python, self.legacy = random.Random(0), np.random.RandomState(0)
        self.torch = torch.Generator().manual_seed(0)
        self.transforms = [Shift(), {"other": Shift()}]
        self.itself = self

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        return [
            self.python.random(), float(self.legacy.rand()), float(torch.rand((), generator=self.torch)),
            float(self.transforms[0].rng.random()), float(self.transforms[1]["other"].rng.random()),
        ]  # fmt: skip


@pytest.fixture
def columns() -> Iterator[Any]:
    def of(init: Any) -> list[tuple[float, ...]]:
        seed_everything(5)
        loader = DataLoader(Subset(Keeps(), range(4)), batch_size=None, num_workers=2, worker_init_fn=init)
        return list(zip(*[sample for _ in range(2) for sample in loader], strict=True))

    return of


def test_generators_of_a_dataset_go_their_own_way_in_each_worker_and_epoch(columns: Any) -> None:
    assert all(len(set(column)) == 2 for column in columns(None)), "copies: both workers, both epochs"
    seeded = columns(seed_worker)
    assert all(len(set(column)) == 8 for column in seeded)
    assert len({value for column in seeded for value in column}) == 40, "no two generators alike"
    assert columns(seed_worker) == seeded


def test_seed_worker_outside_of_a_worker() -> None:
    with pytest.raises(RuntimeError, match=r"seed_worker\(0\) works inside of a DataLoader's worker"):
        seed_worker(0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1,), "seed -1 is outside"),
        ((2**32,), "outside 0 <= seed < 2"),
        ((1.5,), "seed 1.5 is a float: give a whole number"),
        (("42",), "seed '42' is a str: give a whole number"),
        ((None,), "seed None is a NoneType"),
        ((1, "always"), "deterministic='always': give True, False or"),
    ],
)
def test_bad_arguments_change_nothing(arguments: Any, says: str) -> None:
    before = rng.capture()
    with pytest.raises(ValueError, match=says):
        seed_everything(*arguments)
    assert str(rng.capture()) == str(before)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("switch")
def test_deterministic_algorithms_from_now_on() -> None:
    seed_everything(1, deterministic="warn")
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    seed_everything(1, deterministic=True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled(), "False leaves the choice"


def test_cuda_that_started_without_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
        seed_everything(1, deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()

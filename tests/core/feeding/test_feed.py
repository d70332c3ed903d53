"""The user's own data order, found again from (random state, cursor)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from orbit.core import Feed, FeedError, rng
from tests import tiny

SIZE = 23


class Noisy(Dataset[Any]):
    """Augments with every global generator, in the process that fetches. Counts what it is asked for."""

    def __init__(self) -> None:
        self.fetched = 0

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        self.fetched += 1
        return torch.tensor(
            [index, torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64
        )


class Plain(Dataset[Any]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index)])


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(
        Plain() if options.get("num_workers") else Noisy(), batch_size=4, shuffle=True, **options
    )


def with_generator() -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5))


def weighted() -> DataLoader[Any]:
    return DataLoader(
        Noisy(),
        batch_size=4,
        sampler=WeightedRandomSampler([1.0] * SIZE, SIZE, generator=torch.Generator().manual_seed(6)),
    )


def unbatched() -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=None, shuffle=True)


LOADERS = {
    "shuffled": shuffled,
    "drop_last": lambda: shuffled(drop_last=True),
    "own generator": with_generator,
    "weighted": weighted,
    "unbatched": unbatched,
    "workers": lambda: shuffled(num_workers=2),
    "persistent workers": lambda: shuffled(num_workers=2, persistent_workers=True),
}


def bare(loader: Any, epochs: int) -> list[Any]:
    return [batch.tolist() for _ in range(epochs) for batch in loader]


def draw_in_between() -> None:
    """What dropout does between two batches."""
    torch.rand(3)
    random.random()


@pytest.mark.parametrize("kind", LOADERS)
def test_the_order_is_that_of_a_bare_loop(kind: str) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = bare(LOADERS[kind](), 3)
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    feed = Feed(LOADERS[kind]())
    assert [batch.tolist() for epoch in range(3) for batch, _ in feed.epoch(epoch)] == expected


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(("stop_epoch", "stop_at"), [(0, 2), (1, 3), (1, "end")])
def test_resuming_gives_the_batches_that_were_still_to_come(kind: str, stop_epoch: int, stop_at: Any) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    feed, rest = Feed(LOADERS[kind]()), []
    saved: dict[str, Any] | None = None
    stop_at = feed.length if stop_at == "end" else stop_at
    for epoch in range(3):
        for number, (batch, _) in enumerate(feed.epoch(epoch), start=1):
            draw_in_between()
            if saved is not None:
                rest.append(batch.tolist())
            elif (epoch, number) == (stop_epoch, stop_at):
                saved = {"feed": feed.position(), "rng": rng.capture(feed.generators)}
    assert saved is not None

    torch.manual_seed(99), random.seed(99), np.random.seed(99)  # a new process
    feed = Feed(LOADERS[kind]())
    batches = feed.epoch(stop_epoch, saved["feed"])
    rng.restore(saved["rng"], feed.generators)
    again = []
    for epoch in range(stop_epoch, 3):
        for batch, _ in batches if epoch == stop_epoch else feed.epoch(epoch):
            draw_in_between()
            again.append(batch.tolist())
    assert again == rest


def test_skipping_fetches_no_sample() -> None:
    feed = Feed(shuffled())
    batches = feed.epoch(0)
    for _ in range(3):
        next(batches)
    saved = feed.position()
    loader = shuffled()
    next(Feed(loader).epoch(0, saved))
    assert loader.dataset.fetched == 4  # type: ignore[attr-defined]


def test_the_users_loader_is_left_as_it_was() -> None:
    loader = shuffled()
    before = dict(loader.__dict__)
    list(Feed(loader).epoch(0))
    assert loader.__dict__ == before


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(10))


def test_an_iterable_is_replayed_with_one_warning() -> None:
    feed = Feed(DataLoader(Stream(), batch_size=2))
    batches = feed.epoch(0)
    for _ in range(2):
        next(batches)
    again = Feed(DataLoader(Stream(), batch_size=2))
    with pytest.warns(UserWarning, match="reads and drops the 2 batches") as warned:
        rest = [batch.tolist() for batch, _ in again.epoch(0, feed.position())]
    assert rest == [[4, 5], [6, 7], [8, 9]]
    assert len(warned) == 1


@pytest.mark.parametrize("sized", [True, False])
def test_a_stateful_iterable_is_resumed_by_its_own_state(sized: bool) -> None:
    class Counter:
        def __init__(self) -> None:
            self.at = 0

        def __iter__(self) -> Iterator[int]:
            while self.at < 6:
                self.at += 1
                yield self.at
            self.at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    class Sized(Counter):
        def __len__(self) -> int:
            return 6

    make = Sized if sized else Counter
    feed = Feed(make())
    batches = feed.epoch(0)
    assert [next(batches)[0] for _ in range(2)] == [1, 2]
    again = Feed(make())
    assert list(again.epoch(0, feed.position())) == [(3, False), (4, False), (5, False), (6, True)]


def test_a_loader_shorter_than_its_length_is_an_error() -> None:
    class Liar(list[int]):
        def __len__(self) -> int:
            return 9

    with pytest.raises(FeedError, match=r"len\(\) is 9 and it ended after 2"):
        list(Feed(Liar([1, 2])).epoch(0))


def test_a_checkpoint_of_longer_data_is_an_error() -> None:
    feed = Feed(DataLoader(Stream(), batch_size=2))
    batches = feed.epoch(0)
    for _ in range(4):
        next(batches)
    position = feed.position()
    with pytest.raises(FeedError, match="ended after 2"), pytest.warns(UserWarning, match="reads and drops"):
        list(Feed(iter([1, 2])).epoch(0, position))


def test_a_loader_longer_than_its_length_is_an_error() -> None:
    class Liar(list[int]):
        def __len__(self) -> int:
            return 2

    with pytest.raises(FeedError, match=r"len\(\) is 2 and it went on"):
        list(Feed(Liar([1, 2, 3])).epoch(0))


def test_a_checkpoint_of_data_of_another_length_is_an_error() -> None:
    feed = Feed(tiny.loader(50))
    batches = feed.epoch(0)
    for _ in range(5):
        next(batches)
    for samples, batches in ((24, 3), (100, 13)):
        with pytest.raises(FeedError, match=f"stands at batch 5 of 7 and the loader has {batches}"):
            Feed(tiny.loader(samples)).epoch(0, feed.position())


def test_a_subclass_whose_iter_is_a_generator_is_replayed() -> None:
    class Sub(DataLoader[Any]):
        def __iter__(self) -> Any:
            yield from super().__iter__()

    torch.manual_seed(0)
    feed = Feed(Sub(tiny.dataset(), batch_size=8, shuffle=True))
    batches = feed.epoch(0)
    next(batches)
    position = feed.position()
    rest = [x for (x, _), _ in batches]
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="reads and drops the 1 batches"):
        again = [x for (x, _), _ in Feed(Sub(tiny.dataset(), batch_size=8, shuffle=True)).epoch(0, position)]
    assert len(again) == len(rest)
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))

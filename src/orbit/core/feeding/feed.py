"""The user's own data order, remembered as (random state at the epoch's start, cursor).

A bare loop `for batch in loader` draws its order from random generators in the moment the iterator is made. So an
epoch is known by the state those generators had then, and a place in it by the number of batches handed out.
To go on from a place: put that state back, make the iterator again, let it pass over `cursor` lists of indices without
fetching a sample, and continue. The order is the one that the user's loader gives, `shuffle=True` included, and no
data is read twice.

What can be resumed how:

    DataLoader over a map-style dataset    exactly, by skipping indices (any number of workers; any sampler that
                                           draws from the global generators or from its own `.generator`)
    an iterable with its own state_dict()  by its own state_dict / load_state_dict
    any other iterable                     by replaying the epoch up to the cursor, with one warning

Workers that raise, die or hang are named with their sample: `core/feeding/workers.py`.

Augmentation that draws random numbers inside worker processes is repeated exactly only if it is seeded per sample:
a worker's generator depends on which batches it has already seen.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from orbit.core import rng
from orbit.core.feeding.share import FeedError, Share, is_shared
from orbit.core.feeding.workers import Watch
from orbit.core.signals import heard


class _Skipper:
    """A sampler that passes over its first `skip` items, lazily, where the original would have drawn them."""

    def __init__(self, sampler: Any, watch: Watch | None = None) -> None:
        self.sampler, self.watch = sampler, watch
        self.skip = 0
        self._current: _SkippingIterator | None = None

    def __iter__(self) -> Iterator[Any]:
        self._current = _SkippingIterator(
            iter(self.sampler), self.skip, self.watch
        )  # asked for twice an epoch
        return self._current

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # not yet there while unpickling in a worker
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def draw(self) -> bool:
        """Skip now, while the generators are in the epoch's own state; later epochs skip none.

        False if nobody has asked for indices yet: a DataLoader subclass whose `__iter__` is a generator.
        """
        self.skip = 0
        if self._current is None:
            return False
        self._current.draw()
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "watch": None, "skip": self.skip, "_current": None}


class _SkippingIterator:
    def __init__(self, items: Iterator[Any], skip: int, watch: Watch | None) -> None:
        self.items, self.skip, self.watch = items, skip, watch
        self.number = -1  # of the item handed out last

    def draw(self) -> None:
        skip, self.skip = self.skip, 0
        next(islice(self.items, skip, skip), None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.skip:
            self.draw()
        item = next(self.items)
        self.number += 1
        return item if self.watch is None else self.watch.send(self.number, item)


class Feed:
    """Batches of `loader`, epoch by epoch, with a position that can be saved and found again.

    Args:
        loader: any iterable of batches. A one-shot iterator (a generator) serves one epoch.
        shared: deal the batches of a DataLoader out to the ranks (`core/feeding/share.py`), unless its sampler does.

    Raises:
        FeedError: `loader` is not iterable.
    """

    def __init__(self, loader: Iterable[Any], shared: bool = False) -> None:
        if not isinstance(loader, Iterable):
            raise FeedError(
                f"the loader is a {type(loader).__name__}, which cannot be iterated: pass a "
                "DataLoader or a list of batches"
            )
        self.loader = loader
        self.cursor = 0  # batches handed out
        self._start: dict[str, Any] | None = None
        self._resting: dict[str, Any] | None = None
        self._loader_state: dict[str, Any] | None = None
        self._skipper: _Skipper | None = None
        self._share: Share | None = None
        self._spent = False
        self._source: Any = loader
        streams = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
        self._watch = Watch(loader) if isinstance(loader, DataLoader) and loader.num_workers else None
        self.generators = _generators(loader)
        if isinstance(loader, DataLoader) and not streams:
            if shared and not is_shared(loader):
                self._share = Share(loader, self.generators)
            self._source, self._skipper = _skippable(loader, self._share, self._watch)
        self.length = None if streams else _length(self._source)  # a stream's len() is an estimate

    def epoch(self, epoch: int, position: dict[str, Any] | None = None) -> Iterator[tuple[Any, bool]]:
        """(batch, is it the epoch's last?) from the beginning, or from a saved `position`.

        The loader's iterator is made in this call, and the first sample read when the result is first advanced:
        generators that must stand elsewhere by then can be set in between.

        Raises:
            FeedError: now if a one-shot iterator is used up; later if the loader is empty or shorter than its `len()`.
        """
        for part in _set_epoch_targets(self.loader):
            part.set_epoch(epoch)
        batches = self._open() if position is None else self._reopen(position)
        return self._look_ahead(batches) if self.length is None else self._count(batches)

    @property
    def padding(self) -> bool:
        """The batch at hand repeats data, to keep this rank in step: it is to count for nothing."""
        return self._share is not None and self._share.padding and self.cursor == self.length

    def rewind(self) -> None:
        """An epoch is about to begin: it has no position yet."""
        self._start, self.cursor, self._resting = None, 0, None

    def rest(self, position: dict[str, Any] | None) -> None:
        """Stand at a saved position without fetching: the run is over, and may be made longer later."""
        self._resting = position

    def position(self, unused: int = 0) -> dict[str, Any] | None:
        """Where the feed stands, as plain values and tensors; None before an epoch's iterator is made.

        The last `unused` batches were handed out in vain and are to come again (a loader with a state of its own
        cannot step back).
        """
        if self._start is None:
            return self._resting
        state = None
        if self._stateful and self._skipper is None:
            loader: Any = self.loader
            state = self._loader_state if self.length is None else loader.state_dict()
        return {
            "start": self._start,
            "cursor": max(0, self.cursor - unused),
            "length": self.length,
            "loader": state,
        }

    # ── making the epoch's iterator ───────────────────────────────────────────────────────────────────────────

    @property
    def _stateful(self) -> bool:
        return hasattr(self.loader, "state_dict") and hasattr(self.loader, "load_state_dict")

    def _open(self) -> Iterator[Any]:
        if self._spent:
            raise FeedError(
                f"the loader is a one-shot iterator ({type(self.loader).__name__}) and its epoch is over: pass "
                "something that can be iterated again (a DataLoader, a list), or ask for one epoch or fewer steps"
            )
        self.cursor = 0
        self._start = {
            "rng": rng.capture(self.generators),
            "reused": getattr(self._source, "_iterator", None) is not None,
        }
        iterator = self._iterate()
        self._spent = iterator is self.loader
        return iterator

    def _iterate(self) -> Iterator[Any]:
        if self._watch is None:
            return iter(self._source)
        return self._watch.open(self._source, ignored=heard())

    def _reopen(self, position: dict[str, Any]) -> Iterator[Any]:
        self._start, self.cursor = position["start"], position["cursor"]
        if position["length"] != self.length:
            raise FeedError(
                f"the checkpoint stands at batch {self.cursor} of {position['length'] or 'an unknown number'} and the "
                f"loader has {self.length or 'an unknown number'}: resume with the data and batch size of the "
                "interrupted run"
            )
        if self._skipper is not None:
            if self._start["reused"]:
                self._iterate()  # persistent workers: a later epoch resets their iterator, which draws less
            rng.restore(self._start["rng"], self.generators)
            self._skipper.skip = self.cursor
            iterator = self._iterate()
            if self._skipper.draw():
                return iterator if self.cursor else _begun(iterator)
        elif self._stateful:
            self.loader.load_state_dict(position["loader"])  # type: ignore[attr-defined]
            return self._iterate()
        rng.restore(self._start["rng"], self.generators)
        if self.cursor:
            warnings.warn(
                f"{type(self.loader).__name__} has neither indices to skip nor a state_dict: resuming reads and drops "
                f"the {self.cursor} batches that the run has already seen in this epoch",
                stacklevel=4,
            )
        iterator = self._iterate()
        self._spent = iterator is self.loader
        for done in range(self.cursor):
            try:
                next(iterator)
            except StopIteration:
                raise FeedError(
                    f"the checkpoint stands at batch {self.cursor} of the epoch and the loader ended after {done}: "
                    "resume with the data of the interrupted run"
                ) from None
        return iterator if self.cursor else _begun(iterator)

    # ── handing out batches ───────────────────────────────────────────────────────────────────────────────────

    def _count(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """A sized loader: its length tells the last batch, so nothing is fetched before it is needed."""
        for batch in batches:
            self.cursor += 1
            if self.length is not None and self.cursor > self.length:
                raise FeedError(
                    f"the loader's len() is {self.length} and it went on after that: the two must agree, since "
                    "an epoch's last batch is known by its number"
                )
            yield batch, self.cursor == self.length
        if self.cursor == 0:
            raise FeedError(
                "the loader is empty: it gave no batch (is batch_size larger than the dataset, with drop_last?)"
            )
        if self.length is not None and self.cursor < self.length:
            raise FeedError(
                f"the loader's len() is {self.length} and it ended after {self.cursor} batches: the two must agree"
            )

    def _look_ahead(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """A loader of unknown length: the next batch is fetched first, to know whether this one is the last."""
        nothing = object()
        batch = next(batches, nothing)
        if batch is nothing and self.cursor == 0:
            raise FeedError("the loader is empty: it gave no batch")
        while batch is not nothing:
            if self._stateful:  # the state that will hand out the following batch once more
                self._loader_state = self.loader.state_dict()  # type: ignore[attr-defined]
            following = next(batches, nothing)
            self.cursor += 1
            yield batch, following is nothing
            batch = following


def _begun(iterator: Iterator[Any]) -> Iterator[Any]:
    """The first batch is read now, and with it the order drawn, while the generators are in the epoch's own state."""
    return chain(list(islice(iterator, 1)), iterator)


def _skippable(
    loader: DataLoader[Any], share: Share | None, watch: Watch | None
) -> tuple[DataLoader[Any], _Skipper]:
    """A shallow copy of the loader that can skip; the user's own loader stays as it is."""
    clone = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    skipper = _Skipper(getattr(loader, name) if share is None else share, watch)
    if watch is not None:
        clone.__dict__["worker_init_fn"] = watch.worker_init_fn
    clone.__dict__[name] = skipper  # DataLoader refuses to set these by attribute
    clone.__dict__["_iterator"] = None
    return clone, skipper


def _length(loader: Any) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # DataLoader has __len__ but its sampler may not
        return None


def _parts(loader: Any) -> list[Any]:
    """The loader and what it is made of, each once, in a fixed order."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = [
        loader,
        getattr(loader, "dataset", None),
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]
    parts: list[Any] = []
    for part in candidates:
        if part is not None and all(part is not other for other in parts):
            parts.append(part)
    return parts


def _generators(loader: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for part in _parts(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not other for other in found):
            found.append(generator)
    return found


def _set_epoch_targets(loader: Any) -> list[Any]:
    return [part for part in _parts(loader) if callable(getattr(part, "set_epoch", None))]

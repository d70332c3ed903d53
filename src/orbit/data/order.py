"""An order of the data that is a function of (seed, epoch) alone, so that every loop sees the same one.

    for epoch in range(3):                                      a hand-written loop; Engine, BaseTrainer and
        loader.sampler.set_epoch(epoch)                         transformers.Trainer call set_epoch themselves
        for batch in loader: ...

What the model draws (dropout, a generation in between) does not move it, and a run that is resumed in the middle of an
epoch, under any driver, finds it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler


class EpochOrder(Sampler[int]):
    """The order in which `sampler` goes in an epoch, when torch's generator is seeded with seed + epoch.

    Args:
        data: a dataset with a length; its indices are shuffled anew in every epoch. It is told the epoch too, if it has
            a `set_epoch`: on several ranks accelerate's loaders tell the sampler alone.
        seed: of the first epoch.
        sampler: another sampler that draws from torch's global generator, in place of a plain shuffle.

    >>> order = EpochOrder(range(5), seed=1)
    >>> list(order) == list(order), len(order)
    (True, 5)
    >>> first = list(order); order.set_epoch(1); first == list(order)
    False
    """

    def __init__(self, data: Sized, seed: int = 0, sampler: Iterable[int] | None = None) -> None:
        self.data = data
        self.sampler: Any = RandomSampler(data) if sampler is None else sampler
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch comes next."""
        self.epoch = epoch
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.seed + self.epoch)
            order = list(self.sampler)
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)

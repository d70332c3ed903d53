"""Each rank's share of one order of the data.

Rank 0's random generators draw the order that the user's loader would give a bare loop; of R ranks, rank r takes the
items r, r + R, r + 2R, … of it. Batch k of all ranks together then holds the items kRb … (k+1)Rb − 1 of the order (b
the batch size on each rank), whatever R is: a run goes on with the same data on another number of ranks if R·b stays.

No item is repeated to make the shares equal: at the end of the order some ranks have shorter batches. Where a rank is
left without any, it takes the first ones again as padding, in a batch that counts for nothing (weight 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader

from orbit.core import rng, runtime


class FeedError(ValueError):
    """A loader that cannot feed the loop; the message says why and what to pass instead."""


class Share:
    """Batches of indices of this rank, in place of a loader's own batch sampler.

    A loader with a batch sampler of its own, or without batches, deals out whole batches.

    Args:
        loader: a DataLoader over a map-style dataset.
        generators: those that its order is drawn from, beside the global ones.

    Attributes:
        padding: the last batch of the current pass is padding.
    """

    def __init__(self, loader: DataLoader[Any], generators: list[torch.Generator]) -> None:
        own = loader.batch_sampler
        self.splits = type(own) is BatchSampler
        self.sampler: Any = (
            own.sampler
            if isinstance(own, BatchSampler) and self.splits
            else (loader.sampler if own is None else own)
        )
        self.batch_size = (loader.batch_size or 1) if self.splits else 1
        self.drop_last = loader.drop_last if self.splits else False
        self.generators = generators
        self.rank, self.ranks = runtime.rank(), runtime.world_size()
        self.padding = False

    def __len__(self) -> int:
        try:
            items, together = len(self.sampler), self.ranks * self.batch_size
        except TypeError as error:
            raise FeedError(
                f"{type(self.sampler).__name__} has no len(), and is to be dealt out to {self.ranks} ranks: give it "
                "one, or a sampler that deals itself out (with an attribute num_replicas, as DistributedSampler)"
            ) from error
        return items // together if self.drop_last else -(-items // together)

    def __iter__(self) -> Iterator[Any]:
        order, count = self._order(), len(self)
        mine = order[self.rank :: self.ranks]
        self.padding = len(mine) <= (count - 1) * self.batch_size
        if self.padding and order:
            mine = [*mine, *order[: self.batch_size]]  # a whole batch: some layers cannot take one row
        for start in range(0, count * self.batch_size, self.batch_size):
            part = mine[start : start + self.batch_size]
            yield part if self.splits else part[0]

    def _order(self) -> list[Any]:
        """The whole order, as rank 0's generators draw it; theirs alone move."""
        state = [rng.capture(self.generators) if self.rank == 0 else None]
        dist.broadcast_object_list(state, src=0)
        if self.rank == 0:
            return list(self.sampler)
        with rng.preserved(self.generators):
            rng.restore(state[0] or {}, self.generators)
            return list(self.sampler)


def is_shared(loader: DataLoader[Any]) -> bool:
    """The loader deals out shares already: its sampler knows of ranks."""
    samplers = (
        loader.batch_sampler,
        loader.sampler,
        getattr(loader.batch_sampler, "sampler", None),
    )
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)

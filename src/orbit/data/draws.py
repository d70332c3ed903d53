"""Rows drawn evenly, without a generator that would have to be saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvenDraws:
    """`per_epoch` draws an epoch from `rows` rows: one shuffled pass over all rows after the other.

    Epoch e has the draws e·per_epoch … (e+1)·per_epoch − 1 of that course, so that over the epochs no row is drawn more
    than once oftener than another. They follow from seed and epoch alone: workers, ranks and resumed runs agree.

    >>> draws = EvenDraws(rows=3, per_epoch=2, seed="retain")
    >>> sorted(torch.cat([draws.epoch(0), draws.epoch(1), draws.epoch(2)]).tolist())
    [0, 0, 1, 1, 2, 2]
    """

    rows: int
    per_epoch: int
    seed: str

    def epoch(self, epoch: int) -> Tensor:
        """(per_epoch,) int64, each in [0, rows)."""
        start, stop = epoch * self.per_epoch, (epoch + 1) * self.per_epoch
        passes = range(start // self.rows, -(-stop // self.rows))
        course = torch.cat([self._pass(number) for number in passes]) if passes else torch.empty(0).long()
        first = start - passes.start * self.rows
        return course[first : first + self.per_epoch]

    def _pass(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(hashed(self.seed, number))
        return torch.randperm(self.rows, generator=generator)


def hashed(*parts: object) -> int:
    """A whole number in [0, 2**63) from these parts, the same in every process and version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Ragged supervised samples for the tiny model, without a file."""

from __future__ import annotations

import torch
from torch import Tensor


class Sentences:
    """Samples of unequal lengths, whose prompts of unequal lengths are masked."""

    def __init__(self, count: int, vocabulary: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.samples: list[dict[str, Tensor]] = []
        for _ in range(count):
            length = int(torch.randint(5, 17, (), generator=draw))
            ids = torch.randint(3, vocabulary, (length,), generator=draw)
            prompt = int(torch.randint(1, length - 2, (), generator=draw))
            labels = torch.where(torch.arange(length) < prompt, -100, ids)
            self.samples.append({"input_ids": ids, "labels": labels})
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.seen.append(index)
        return self.samples[index]

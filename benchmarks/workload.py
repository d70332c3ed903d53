"""What every contender trains, and the clock that times it.

The clock sits in the data: one epoch is `steps` batches, and the dataset notes the time when batch number
`warmup` is fetched and again when the last one is. Time per step is the difference over the number of steps
between. So start-up and tear-down do not count, everything that a loop does on the way does (its progress
every n steps, its logging, the garbage it makes), and a loop that fetches one batch ahead gains nothing by
it, since both moments shift alike. On CUDA the device is synchronised at those two moments, and nowhere else.

All batches are the same pair of tensors, on the device already: the order in which a loop reads them cannot
matter, and every contender must end at the same weights as the bare loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

CLIP = 1.0
Batch = tuple[Tensor, Tensor]


class ClockedBatches(Dataset[Batch]):
    """`steps` times the same batch; fetching number `warmup` and the last one are the clock's two moments."""

    def __init__(self, batch: Batch, steps: int, warmup: int, clock: Callable[[], float]) -> None:
        self.batch, self.steps, self.warmup, self.clock = batch, steps, warmup, clock
        self.fetched = 0
        self.moments: list[float] = []

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        if self.fetched in (self.warmup, self.steps - 1):
            if self.batch[0].is_cuda:
                torch.cuda.synchronize()
            self.moments.append(self.clock())
        self.fetched += 1
        return self.batch

    @property
    def seconds_per_step(self) -> float:
        start, end = self.moments
        return (end - start) / (self.steps - 1 - self.warmup)


def first(items: list[Batch]) -> Batch:
    """Collate a 'batch' of one, which is a whole batch already."""
    return items[0]


@dataclass
class Job:
    """One fresh run: everything that the contenders share, built anew for each."""

    model: nn.Module
    batches: ClockedBatches
    device: str

    def __post_init__(self) -> None:
        self.loader = DataLoader(self.batches, batch_size=1, collate_fn=first)
        self.criterion = nn.MSELoss()
        self.optimizer = AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1.0)

    @property
    def steps(self) -> int:
        return self.batches.steps


@dataclass(frozen=True)
class Workload:
    """A model and how long to train it."""

    name: str
    make_model: Callable[[], nn.Module]
    input_shape: tuple[int, int]
    steps: int
    warmup: int
    device: str = "cpu"
    clock: Callable[[], float] = time.perf_counter

    def job(self) -> Job:
        torch.manual_seed(0)
        model = self.make_model().to(self.device)
        x = torch.randn(self.input_shape, device=self.device)
        batches = ClockedBatches((x, torch.zeros_like(x)), self.steps, self.warmup, self.clock)
        return Job(model, batches, self.device)


def one_parameter() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def ten_million_parameters() -> nn.Module:
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1600, 1600), nn.ReLU())])

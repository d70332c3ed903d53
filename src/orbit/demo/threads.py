"""How many threads pay: all of torch's, or one where something else uses the machine.

torch's threads meet at the end of every operation and spin while they wait. Alone on two cores that is 1.5 times
as fast as one thread; beside another busy process the one that was put aside is waited for thousands of times a
second, and a training step of SmolLM2 was seen to take 7 to 30 s in place of 0.9 s. So the demo measures, a
tenth of a second every few steps, and takes what is faster at the moment. Sums may differ in their last bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from orbit.core.events import Plugin


def pick_threads(most: int, rounds: int = 3) -> int:
    """Set torch to `most` threads or to 1, whichever now runs a few small matrix products faster; say which.

    Both are timed in turn, and the median counts: one lucky turn must not.
    """
    if most > 1:
        rows, weight = torch.ones(160, 576), torch.ones(576, 1536)
        times: dict[int, list[float]] = {1: [], most: []}
        for _ in range(rounds):
            for threads, taken in times.items():
                torch.set_num_threads(threads)
                began = time.perf_counter()
                for _ in range(8):
                    rows @ weight
                taken.append(time.perf_counter() - began)
        most = min(times, key=lambda threads: sorted(times[threads])[rounds // 2])
        torch.set_num_threads(most)
    return most


@contextmanager
def threads_restored() -> Iterator[int]:
    """A block after which torch has the number of threads that it began with, which is the block's value."""
    threads = torch.get_num_threads()
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class PickThreads(Plugin):
    """`pick_threads(most)` before every `interval`-th step."""

    def __init__(self, most: int, interval: int = 8) -> None:
        self.most, self.interval = most, interval

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step % self.interval == 0:
            pick_threads(self.most)

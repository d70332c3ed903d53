"""Compute a batch as training would, and leave no trace: for measuring what a step takes before it is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orbit.core import rng, runtime

if TYPE_CHECKING:
    from orbit.core.loop import Core
    from orbit.core.outcome import Outcome


@contextmanager
def rehearsal(trainer: Core, batch: Any) -> Iterator[Outcome]:
    """Forward and loss of `batch` in training mode, by the trainer's own way to compute them (`auto_update`,
    `BaseTrainer.forward`). The outcome is there inside, with its graph; there is no backward.

    Random generators, buffers (running means), training flags and the batch at hand are put back on every way out; the
    trainer must be built. What the user's own forward changes besides (a counter, a file) stays changed.
    """
    model = trainer.model
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    generators = () if trainer._feed is None else trainer._feed.generators
    with rng.preserved(generators), trainer.bracketed():
        try:
            model.train()
            trainer._receive(batch)
            with runtime.unsynchronised(model), trainer.autocast():
                yield trainer._forward()
        finally:
            for buffer, value in buffers:
                buffer.detach().copy_(value)

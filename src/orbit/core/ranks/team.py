"""What the ranks of one run tell each other, so that they take the same way at every fork of it.

Ranks that train one model must do the same collective operations in the same order. So whatever decides about the way
(stop, leave on a signal, drop a window, end an epoch) is asked of all ranks at the same places:

    the end of every window    one exchange of a few numbers: the window's weight, wishes to stop, signals
    the end of an epoch        its losses, and wishes to stop
    loading and saving         what rank 0 found or could not write (`on_main`)

A wish of one rank takes effect on all of them at the next such place.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from orbit.core import runtime

T = TypeVar("T")


class Team:
    """The ranks that train one model together.

    Args:
        device: where small exchanges are made: of a type that the process group's backend serves.
    """

    def __init__(self, device: torch.device) -> None:
        self.size = runtime.world_size()
        self.device = device

    def gather(self, numbers: Sequence[float | Tensor]) -> Tensor:
        """Every rank's `numbers`: (ranks, numbers) in float64 on `device`. Nothing is read by the host."""
        mine = torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=self.device).reshape(()) for n in numbers]
        )
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows)

    def any(self, flag: bool) -> bool:
        """Does it hold on some rank?"""
        return bool(self.gather([float(flag)]).max() > 0)


def everyones(value: T, group: Any = None) -> list[T]:
    """A picklable value of every rank, by rank; `[value]` in a single process."""
    if runtime.world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * runtime.world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def on_main(work: Callable[[], T], group: Any = None) -> T:
    """Do something on rank 0 alone and give all ranks its (picklable) result; what it raises is raised on all."""
    if runtime.world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if runtime.is_main_process():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    shown = [outcome[0], _sendable(outcome[1])]
    dist.broadcast_object_list(shown, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    if shown[1] is not None:
        raise shown[1]
    return shown[0]


def on_all(work: Callable[[], T]) -> T:
    """Do something on every rank; what any of them raises is raised on all."""
    if runtime.world_size() == 1:
        return work()
    value, own = None, None
    try:
        value = work()
    except Exception as error:
        own = error
    raised = [error for error in everyones(_sendable(own)) if error is not None]
    if own is not None:
        raise own
    if raised:
        raise raised[0]
    return cast(T, value)


def _sendable(error: Exception | None) -> Exception | None:
    """The error, or one of a kind that can be pickled and says the same."""
    if error is None or _pickles(error):
        return error
    return RuntimeError(f"another rank raised {type(error).__name__}: {error}")


def _pickles(error: Exception) -> bool:
    try:
        return isinstance(pickle.loads(pickle.dumps(error)), type(error))
    except Exception:
        return False

"""The terms A, B, C, D (`lora.py`) of several tasks at one linear layer, brought together in three ways.

    together   A (ΣR, in), B (out, ΣR) end to end, and the weights in C: a weighted sum of tasks, scalings per
               token, or a mask of zeros and ones per row. Every row is multiplied by every task's A and B.
    per_row    A (n, R, in), B (n, out, R): each row, or each block of rows of one task, has its own. No wasted
               products and no copy of x, but a copy of the factors for every row.
    grouped    x is sorted by task: no wasted products and no copies of factors, but two of the rows.

Which is best was measured (8 tasks, rank 16, float32 and bfloat16, 1 thread, time over that of the layer without
tasks, hidden 512): rows of 128 tokens: together 1.6, per_row 1.15, grouped 1.4; 32 rows of one token: together
1.7, per_row 3, grouped 1.3. So a row with at least as many tokens as the rank gets its own factors, and shorter
ones are grouped. The mask is for compiled graphs, whose shapes may not depend on who got how many rows, and for
training on short rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Terms(NamedTuple):
    """One task at one layer: A (r, in), B (out, r), C () and D (out,) or None."""

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None


class Stack(NamedTuple):
    """The tasks of a layer: A (n, R, in), B (n, out, R) times C, D (n, out) or None.

    End to end: A (ΣR, in), B (out, ΣR).
    """

    A: Tensor
    B: Tensor
    D: Tensor | None


class Sorting(NamedTuple):
    """The rows of a batch by task. The last task may be none, the base model.

    Attributes:
        task: (rows,) the number of each row's task; as many as there are tasks for none.
        members: (tasks, most) the rows of each task; where it has fewer than the most, some row to fill up.
        place: (rows,) where each row is in the flattened `members`.
        blocks: do the tasks follow each other in order, with equally many rows each?
        none: does some row use none?
        kept: what layers derived for inference under this route, by `id(layer)`.
    """

    task: Tensor
    members: Tensor
    place: Tensor
    blocks: bool
    none: bool
    kept: dict[int, Kept]


def sorting(rows: Sequence[Sequence[int]], device: torch.device) -> Sorting:
    """The Sorting of the rows of each task and, last, of none.

    >>> s = sorting([[1, 2], [0], []], torch.device("cpu"))
    >>> s.task.tolist(), s.members.tolist(), s.place.tolist()
    ([1, 0, 0], [[1, 2], [0, 0]], [2, 0, 1])
    """
    none = bool(rows[-1])
    used = rows if none else rows[:-1]
    most = max(map(len, used))
    order = {row: (task, spot) for task, found in enumerate(used) for spot, row in enumerate(found)}
    members = [[*found, *[0] * (most - len(found))] for found in used]
    flat = [row for found in members for row in found]

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Sorting(
        task=tensor([order[row][0] for row in range(len(order))]),
        members=tensor(members),
        place=tensor([order[row][0] * most + order[row][1] for row in range(len(order))]),
        blocks=flat == list(range(len(order))),
        none=none,
        kept={},
    )


def end_to_end(terms: Sequence[Terms]) -> Stack:
    """The terms of tasks, whose ranks follow each other."""
    A, B = torch.cat([t.A for t in terms]), torch.cat([t.C * t.B for t in terms], 1)
    return Stack(A, B, _of_tasks(terms))


def together(stack: Stack, weights: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A, B, C, D of the sum of the tasks end to end in `stack` with weights (…, tasks), and C = `by_rank` of them."""
    return stack.A, stack.B, C, None if stack.D is None else weights.to(stack.D.dtype) @ stack.D


def by_rank(weights: Tensor, ranks: Sequence[int]) -> Tensor:
    """Weights (…, tasks), each as often as its task has ranks: (…, ΣR), which lies rank-major (`lora.py`).

    >>> by_rank(torch.tensor([0.5, 2.0]), [1, 3])
    tensor([0.5000, 2.0000, 2.0000, 2.0000])
    """
    of_task = weights.reshape(-1, weights.shape[-1]).T
    each = [of_task[k : k + 1].expand(rank, of_task.shape[1]) for k, rank in enumerate(ranks)]
    return torch.cat(each).T.view(*weights.shape[:-1], sum(ranks))


def per_row(stack: Stack, order: Sorting, dims: int) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """A (n, R, in), B (n, out, R), C and D (rows, 1, …, out) for a batch with so many dimensions."""
    A, B = stack.A, stack.B
    if not order.blocks:
        A, B = A.index_select(0, order.task), B.index_select(0, order.task)
    return A, B, None, _of_rows(stack.D, order, dims)


def grouped(u: Tensor, b: Tensor | None, x: Tensor, stack: Stack, order: Sorting) -> Tensor:
    """y of the rows x (rows, …, in) under each row's task, given u (rows, …, out). For inference: writes into u."""
    tasks, most = order.members.shape
    each = x.index_select(0, order.members.flatten()).to(u.dtype).reshape(tasks, -1, x.shape[-1])
    h = torch.bmm(each, stack.A.to(u.dtype).mT)
    added = torch.bmm(h, stack.B.to(u.dtype).mT).view(tasks * most, *u.shape[1:]).index_select(0, order.place)
    D = _of_rows(stack.D, order, u.dim())
    if D is not None:
        u = torch.addcmul(u, u if b is None else u - b.to(u.dtype), D.to(u.dtype))
    return u.add_(added)


def _of_rows(D: Tensor | None, order: Sorting, dims: int) -> Tensor | None:
    return None if D is None else D.index_select(0, order.task).view(-1, *[1] * (dims - 2), D.shape[1])


def stacked(terms: Sequence[Terms], none: bool) -> Stack:
    """The terms of tasks, padded to one rank, and of none."""
    R = max(t.A.shape[0] for t in terms)
    As, Bs, Cs = [t.A for t in terms], [t.B for t in terms], [t.C for t in terms]
    if any(A.shape[0] < R for A in As):
        As = [F.pad(A, (0, 0, 0, R - A.shape[0])) for A in As]
        Bs = [F.pad(B, (0, R - B.shape[1])) for B in Bs]
    D = _of_tasks(terms)
    if none:
        As, Bs, Cs = ([*ts, torch.zeros_like(ts[0])] for ts in (As, Bs, Cs))
        D = None if D is None else F.pad(D, (0, 0, 0, 1))
    B = torch.stack(Cs).view(-1, 1, 1) * torch.stack(Bs)
    return Stack(torch.stack(As), B, D)


def _of_tasks(terms: Sequence[Terms]) -> Tensor | None:
    """D (n, out) of tasks, zero for those without; None if none has one."""
    found = [t.D for t in terms if t.D is not None]
    if not found:
        return None
    zero = torch.zeros_like(found[0])
    return torch.stack([zero if t.D is None else t.D for t in terms])


class Kept(NamedTuple):
    """A layer's Stack, for as long as nothing that it was made from is replaced or written to.

    Two ways of writing leave no mark on a tensor: fused optimizers, and `parameter.data`. So the layer counts its
    `age`, which is another after it was trained, `set_trainable`, `train()` or `eval()`.
    """

    sources: list[weakref.ref[Tensor]]
    versions: list[tuple[int, int]]
    age: int
    stack: Stack

    @classmethod
    def made_from(cls, sources: Sequence[Tensor], age: int, stack: Stack) -> Kept | None:
        """This stack of these; None if what they are cannot be told later on, or it is no tensor to keep."""
        if type(stack.A) is not Tensor or any(t.is_inference() for t in sources):
            return None
        return cls([weakref.ref(t) for t in sources], _versions(sources), age, stack)

    def holds(self, sources: Sequence[Tensor], age: int, dtype: torch.dtype) -> bool:
        """Is this the stack of these sources, at this age of the layer and in this dtype?"""
        if self.age != age or self.stack.A.dtype != dtype or len(sources) != len(self.sources):
            return False
        for ref, (version, place), t in zip(self.sources, self.versions, sources, strict=True):
            if ref() is not t or t._version != version or (place and t.data_ptr() != place):
                return False
        return True


def _versions(sources: Sequence[Tensor]) -> list[tuple[int, int]]:
    # A tensor subclass (torchao's quantised weights) need not have an address.
    plain = (Tensor, torch.nn.Parameter)
    return [(t._version, t.data_ptr() if type(t) in plain else 0) for t in sources]

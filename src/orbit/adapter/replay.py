"""Which route a forward saw, asked during the backward pass.

Activation checkpointing runs a forward again inside the backward pass, when the route may have changed: `loss_a` and
`loss_b` were computed under tasks a and b, and both are replayed under whatever is current now. The replay must use
the route of its own forward.

Autograd numbers its nodes in the order of their creation, per thread. So the history of a route is a list of
(number of the next node, task) noted at every switch; the node that autograd is evaluating while a layer is replayed
tells when its forward ran, and the history tells which task was current then. This pins every replay, whoever
started it: transformers' gradient checkpointing, `torch.utils.checkpoint` in both its variants, an adjoint method.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right

import torch
from torch.utils.checkpoint import CheckpointFunction

from orbit.adapter.errors import RouteError

LIMIT = 4096  # switches that are remembered; a forward and its backward lie far fewer apart


def in_backward() -> bool:
    """Is this thread inside a backward pass?"""
    return torch._C._current_graph_task_id() != -1


class History:
    """The switches of one route: per thread, the numbers of the nodes at which a task became current."""

    def __init__(self, task: str | None) -> None:
        self._first = task
        self._switches: dict[int, tuple[list[int], list[str | None]]] = {}
        self._tasks: set[str | None] = {task}
        self._cut: set[int] = set()

    def note(self, task: str | None) -> None:
        """`task` is current in this thread from now on."""
        numbers, tasks = self._switches.setdefault(threading.get_ident(), ([], []))
        if tasks and tasks[-1] == task:
            return
        now = torch._C._autograd._get_sequence_nr()
        if numbers and numbers[-1] == now:  # nothing was recorded under the last switch
            tasks[-1] = task
        else:
            numbers.append(now)
            tasks.append(task)
        self._tasks.add(task)
        if len(numbers) > LIMIT:
            del numbers[: LIMIT // 2], tasks[: LIMIT // 2]
            self._cut.add(threading.get_ident())

    def task_of_replay(self) -> str | None:
        """The task that was current when the node now being evaluated was created.

        Raises:
            RouteError: if that lies too far back, or if several threads ran forwards under different tasks, so
                that the node's number does not tell.
        """
        if len(self._tasks) == 1:
            return self._first
        node = _original_node()
        if node is None:
            raise RouteError(
                f"an adapted layer is replayed in a backward pass that has no current node; {_WAY_OUT}"
            )
        number = node._sequence_nr()
        found: set[str | None] = set()
        for thread, (numbers, tasks) in self._switches.items():
            index = bisect_right(numbers, number) - 1
            if index < 0 and thread in self._cut:
                raise RouteError(
                    f"over {LIMIT // 2} route switches lie between a forward and its replay; {_WAY_OUT}"
                )
            found.add(self._first if index < 0 else tasks[index])
        if len(found) > 1:
            raise RouteError(
                f"a checkpointed forward is replayed and ran under one of the tasks {sorted(map(repr, found))}, "
                f"switched by {len(self._switches)} threads; {_WAY_OUT}"
            )
        return found.pop()


_WAY_OUT = "run forward and backward under one route, or turn activation checkpointing off"


def _original_node() -> torch.autograd.graph.Node | None:
    """The node of the outermost backward pass: a reentrant checkpoint inside another is itself a replay."""
    node = torch._C._current_autograd_node()
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    return node

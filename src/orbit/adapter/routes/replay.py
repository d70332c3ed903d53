"""Which route a forward saw, asked during the backward pass.

Activation checkpointing runs a forward again inside the backward pass, when the route may have changed:
`loss_a` and `loss_b` were computed under tasks a and b, and both are replayed under whatever is current now.
The replay must use the route of its own forward.

Autograd numbers its nodes in the order of their creation, per thread. So the history of a route is a list of
(number of the next node, route) noted at every switch; the node that autograd is evaluating while a layer is
replayed tells when its forward ran, and the history tells which route was current then. This pins every
replay, whoever started it: transformers' gradient checkpointing, `torch.utils.checkpoint` in both its
variants, an adjoint method.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from types import FrameType

import torch
from torch.utils.checkpoint import CheckpointFunction

from orbit.adapter.errors import RouteError
from orbit.adapter.routes.plan import PerRow, Route, Scaled, Together, describe, own, renamed

LIMIT = 4096  # switches that are remembered; a forward and its backward lie far fewer apart
HEAVY = 16  # of them that keep tensors: scalings, and with them perhaps the graph of a router, or a cache


def in_backward() -> bool:
    """Is this thread inside a backward pass?"""
    return torch._C._current_graph_task_id() != -1


class History:
    """The switches of one model: per thread, the numbers of the nodes at which a route became current."""

    def __init__(self, route: Route) -> None:
        self._first = route
        self._constant = True
        self._switches: dict[int, tuple[list[int], list[Route | _Forgotten]]] = {}
        self._cut: set[int] = set()

    def note(self, route: Route) -> None:
        """`route` is current in this thread from now on."""
        numbers, routes = self._switches.setdefault(threading.get_ident(), ([], []))
        if routes and routes[-1] == route:
            return
        now = torch._C._autograd._get_sequence_nr()
        if numbers and numbers[-1] == now:  # nothing was recorded under the last switch
            routes[-1] = route
        else:
            numbers.append(now)
            routes.append(route)
        self._constant = self._constant and route == self._first
        if isinstance(own(route), Scaled):
            _forget_heavy(routes)
        if len(routes) > HEAVY:
            old = routes[-1 - HEAVY]
            old = old if isinstance(old, _Forgotten) else own(old)
            if isinstance(old, (PerRow, Together)):
                old.cache.clear()  # it is made anew where it is needed
        if len(numbers) > LIMIT:
            del numbers[: LIMIT // 2], routes[: LIMIT // 2]
            self._cut.add(threading.get_ident())

    def rename(self, old: str, new: str) -> None:
        """Task `old` is called `new` from now on."""
        self._first = renamed(self._first, old, new)
        for _, routes in self._switches.values():
            routes[:] = [r if isinstance(r, _Forgotten) else renamed(r, old, new) for r in routes]

    def route_of_replay(self) -> Route:
        """The route that was current when the node now being evaluated was created.

        Raises:
            RouteError: if that lies too far back, or if several threads ran forwards under different routes,
                so that the node's number does not tell.
        """
        if self._constant:
            return self._first
        node = _original_node()
        if node is None:
            raise RouteError(
                f"an adapted layer is replayed in a backward pass that has no current node; {_WAY_OUT}"
            )
        number = node._sequence_nr()
        found: list[Route | _Forgotten] = []
        for thread, (numbers, routes) in self._switches.items():
            index = bisect_right(numbers, number) - 1
            route = self._first if index < 0 else routes[index]
            if isinstance(route, _Forgotten) or (index < 0 and thread in self._cut):
                raise RouteError(
                    f"over {HEAVY if isinstance(route, _Forgotten) else LIMIT // 2} route switches lie between "
                    f"a forward and its replay; {_WAY_OUT}"
                )
            if route not in found:
                found.append(route)
        if len(found) > 1:
            raise RouteError(
                "a checkpointed forward is replayed that ran under one of "
                f"{', '.join(sorted(describe(route) for route in found))}, "  # type: ignore[arg-type]
                f"switched by {len(self._switches)} threads; {_WAY_OUT}"
            )
        return found[0]  # type: ignore[return-value]


class _Forgotten:
    """In the place of a route whose tensors were let go."""


def _forget_heavy(routes: list[Route | _Forgotten]) -> None:
    seen = 0
    for index in range(len(routes) - 1, -1, -1):
        if isinstance(own(routes[index]), Scaled):  # type: ignore[arg-type]
            seen += 1
            if seen > HEAVY:
                routes[index] = _Forgotten()
        elif isinstance(routes[index], _Forgotten):
            return


_WAY_OUT = "run forward and backward under one route, or turn activation checkpointing off"


def _original_node() -> torch.autograd.graph.Node | None:
    """The node of the outermost backward pass: a reentrant checkpoint inside another is itself a replay."""
    node = torch._C._current_autograd_node()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            node = frame.f_locals["ctx"]
        frame = frame.f_back
    return node

"""What a route is, and what it tells a layer.

A route says which tasks a model uses:

    None                          the base model
    "math"                        one task
    PerRow("math", None, "law")   one task per row of the batch; None is the base model
    Together({"a": .5, "b": 2})   several at once, a weighted sum
    Scaled(("a", "b"), S)         several at once, weighted by a tensor S that a router computed

A layer is told no more than it needs, its plan: None, the Slot (or ModuleSlot) of one task, or a Mix of several:

    y = base + Σ_t w_t·(y_t − base)        y_t: the layer's output under task t, base: under none

where w is a number per task, 0 or 1 per row and task, or whatever S says. Tasks that the layer does not carry
are left out of its plan: their y_t is base. So are tasks that no row of the batch uses, whose parameters then
get no gradient at all rather than zeros, which an optimizer with momentum or weight decay would apply.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from orbit.adapter.errors import RouteError
from orbit.adapter.owners import AnySlot
from orbit.adapter.routes.stacks import Sorting, sorting

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft


@dataclass(frozen=True)
class PerRow:
    """One task per row of the batch, None for the base model.

    A batch may have a multiple of the route's rows; each then stands for so many neighbouring rows, which is how
    beams and flattened tokens are laid out.
    """

    tasks: tuple[str | None, ...]
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerRow, (self.tasks,)


@dataclass(frozen=True)
class Together:
    """A weighted sum of tasks, as (task, weight) pairs."""

    weights: tuple[tuple[str, float], ...]
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Together, (self.weights,)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task, _ in self.weights)


@dataclass(frozen=True, eq=False)
class Scaled:
    """Tasks weighted by a tensor, (batch, sequence, layers, tasks), with gradient if it has one.

    `layers` gives a layer's place along the third axis by `id(layer)`; a layer without a place stays at its base.
    `flat` holds the `id` of layers whose input may have batch and sequence as one axis, its tokens in order.
    Where that axis has stride 0, all layers share what is derived from the scalings.
    """

    tasks: tuple[str, ...]
    scalings: Tensor
    layers: Mapping[int, int]
    flat: Collection[int] = ()
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def at(self, place: int, mine: tuple[str, ...], device: torch.device) -> tuple[Tensor, dict[Any, Tensor]]:
        """The weights (batch, sequence, tasks) of some tasks at a place, and what layers derived from them."""
        shared = self.scalings.stride(2) == 0
        # A reentrant checkpoint runs forwards without gradient; what they make is not for those with.
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        key = (0 if shared else place, mine, device, mode)
        if key not in self.cache:
            if mode not in self.cache:
                self.cache[mode] = (self.scalings[:, :, 0],) if shared else self.scalings.unbind(2)
            weights = self.cache[mode][key[0]]
            if mine != self.tasks:
                weights = weights[..., [self.tasks.index(task) for task in mine]]
            self.cache[key] = weights.to(device), {}
        weights, derived = self.cache[key]
        return weights, derived

    def __reduce__(self) -> tuple[Any, ...]:
        raise RouteError(
            "scalings belong to the layers of one model and cannot be copied or saved with it; make another route "
            "the default before, by set_route(model, task)"
        )


@dataclass(frozen=True)
class Spread:
    """A route, and tasks that only other ranks of a sharded model use in the same call (`ranks.py`)."""

    route: str | PerRow | Together | Scaled | None
    others: tuple[str, ...]


Route: TypeAlias = "str | PerRow | Together | Scaled | Spread | None"


class Mix(NamedTuple):
    """Several tasks at one layer.

    Attributes:
        slots: the owners of each task.
        weights: (tasks,), (rows, tasks) or (batch, sequence, tasks), on the layer's device.
        rows: of one task per row: for each slot the rows that use it, (n,) long, and last the rows of none;
            else None.
        order: the same, for linear layers.
        derived: of scalings: what linear layers made of `weights`, shared by those that have the same.
        fits: of one task per row: what `fitted` made of `weights`, `rows` and `order`, by the number of rows.
        flat: of weights per token: may the input have batch and sequence as one axis?
    """

    slots: tuple[AnySlot, ...]
    weights: Tensor
    rows: tuple[Tensor, ...] | None = None
    order: Sorting | None = None
    fits: dict[int, tuple[Tensor, tuple[Tensor, ...], Sorting | None]] | None = None
    flat: bool = False
    derived: dict[Any, Tensor] | None = None

    def fitted(self, rows: int) -> Mix:
        """This mix of one task per row for a batch of so many rows.

        Raises:
            RouteError: that is no multiple of the route's rows.
        """
        have = len(self.weights)
        if self.rows is None or rows == have:
            return self
        if rows % have:
            raise RouteError(
                f"the route has one task for each of {have} rows, and an adapted layer was given {rows}; "
                "the first axis of its input must be the batch, or neighbouring rows of it flattened"
            )
        if torch.compiler.is_compiling():
            return Mix(self.slots, *self._spread(rows // have))
        assert self.fits is not None
        if rows not in self.fits:
            if len(self.fits) >= FITS:
                self.fits.clear()
            with torch.inference_mode(False):
                weights, spread = self._spread(rows // have)
                order = sorting([found.tolist() for found in spread], weights.device)
                self.fits[rows] = weights, spread, order
        return Mix(self.slots, *self.fits[rows])

    def _spread(self, each: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The weights and rows of a batch in which each row of the route stands for so many."""
        assert self.rows is not None
        steps = torch.arange(each, device=self.weights.device)
        spread = tuple((found[:, None] * each + steps).flatten() for found in self.rows)
        return self.weights.repeat_interleave(each, 0), spread


FITS = 16  # sizes of batch that a route remembers; the layers of a model see a few at a time


class Touched(NamedTuple):
    """A plan, and the owners of tasks that only other ranks use here: their gradients are zeros."""

    plan: AnySlot | Mix | None
    others: tuple[AnySlot, ...]


Plan: TypeAlias = "AnySlot | Mix | Touched | None"


def as_route(task: object = None, tasks: object = None) -> Route:
    """The route that `task=` (a name, None, or one of them per row) or `tasks=` (several together) means.

    >>> as_route("a"), as_route(["a", None]).tasks, as_route(tasks={"a": 0.5}).weights
    ('a', ('a', None), (('a', 0.5),))

    Raises:
        RouteError: neither of these, or both at once.
    """
    if tasks is not None:
        if task is not None:
            raise RouteError(
                f"give task={task!r} or tasks={tasks!r}, not both: one chooses, the other adds up"
            )
        return _together(tasks)
    if task is None or isinstance(task, (str, PerRow, Together, Scaled)):
        return task
    if isinstance(task, Sequence) and task and all(name is None or isinstance(name, str) for name in task):
        return PerRow(tuple(task))
    raise RouteError(
        f"a route is a task's name, None for the base model, or a list with one of these per row; got {task!r}"
    )


def _together(tasks: object) -> Together:
    if isinstance(tasks, str):
        tasks = [tasks]
    if isinstance(tasks, Sequence) and all(isinstance(name, str) for name in tasks):
        if len(set(tasks)) < len(tasks):
            raise RouteError(
                f"tasks={list(tasks)!r} names a task twice; give weights: tasks={{name: weight}}"
            )
        tasks = dict.fromkeys(tasks, 1.0)
    if not isinstance(tasks, Mapping) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise RouteError(f"tasks is a list of names or a dict of name: weight, and not empty; got {tasks!r}")
    for name, weight in tasks.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight):
            raise RouteError(f"the weight of task {name!r} must be a finite number, got {weight!r}")
    return Together(tuple((name, float(weight)) for name, weight in tasks.items()))


def names_in(route: Route) -> tuple[str, ...]:
    """The tasks that a route uses, each once, in order."""
    if route is None:
        return ()
    if isinstance(route, str):
        return (route,)
    if isinstance(route, Spread):
        return names_in(route.route)
    return tuple(dict.fromkeys(task for task in route.tasks if task is not None))


def own(route: Route) -> str | PerRow | Together | Scaled | None:
    """A route without what other ranks use."""
    return route.route if isinstance(route, Spread) else route


def describe(route: Route) -> str:
    """A route as an error message names it."""
    route = own(route)
    if isinstance(route, PerRow):
        return f"the rows {list(route.tasks)!r}"
    if isinstance(route, Together):
        return f"the tasks {dict(route.weights)!r} together"
    if isinstance(route, Scaled):
        return f"the tasks {list(route.tasks)!r} scaled"
    return "the base model" if route is None else f"task {route!r}"


def renamed(route: Route, old: str, new: str) -> Route:
    """The same route, where task `old` is now called `new`.

    >>> renamed("a", "a", "b"), renamed(PerRow(("a", None)), "a", "b").tasks
    ('b', ('b', None))
    """

    def now(task: Any) -> Any:
        return new if task == old else task

    if isinstance(route, Spread):
        return Spread(own(renamed(route.route, old, new)), tuple(map(now, route.others)))
    if isinstance(route, PerRow):
        return PerRow(tuple(map(now, route.tasks)))
    if isinstance(route, Together):
        return Together(tuple((now(task), weight) for task, weight in route.weights))
    if isinstance(route, Scaled):
        return Scaled(tuple(map(now, route.tasks)), route.scalings, route.layers, route.flat)
    return now(route)


def plan_of(route: Route, layer: Graft) -> Plan:
    """What `layer` is told under `route`."""
    slots = layer.slots()
    if isinstance(route, Spread):
        plan = plan_of(route.route, layer)
        others = tuple(slots[task] for task in route.others if task in slots)
        return Touched(plan, others) if others else plan  # type: ignore[arg-type]
    if route is None or isinstance(route, str):
        return None if route is None else slots.get(route)
    mine = tuple(task for task in names_in(route) if task in slots)
    if not mine:
        return None
    owners = tuple(slots[task] for task in mine)
    device = layer.owners_device()
    if isinstance(route, Scaled):
        place = route.layers.get(id(layer))
        if place is None:
            return None
        weights, derived = route.at(place, mine, device)
        return Mix(owners, weights, derived=derived, flat=id(layer) in route.flat)
    key = (mine, device)
    if key not in route.cache:
        with torch.inference_mode(False):  # they may be kept until a training step, which saves them
            if isinstance(route, PerRow):
                route.cache[key] = _row_weights(route, mine, device)
            else:
                route.cache[key] = _sum_weights(route, mine, device)
    return Mix(owners, *route.cache[key])


def _sum_weights(route: Together, mine: tuple[str, ...], device: torch.device) -> tuple[Tensor, None]:
    weights = dict(route.weights)
    exact = torch.float32 if device.type == "mps" else torch.float64  # whatever torch's default is
    return torch.tensor([weights[task] for task in mine], dtype=exact, device=device), None


def _row_weights(
    route: PerRow, mine: tuple[str, ...], device: torch.device
) -> tuple[Tensor, tuple[Tensor, ...], Sorting, dict[int, Any]]:
    one_hot = torch.tensor([[float(task == name) for name in mine] for task in route.tasks], device=device)
    rows: dict[str | None, list[int]] = {name: [] for name in (*mine, None)}
    for row, task in enumerate(route.tasks):
        rows[task if task in mine else None].append(row)
    found = list(rows.values())
    indices = tuple(torch.tensor(one, dtype=torch.long, device=device) for one in found)
    return one_hot, indices, sorting(found, device), {}

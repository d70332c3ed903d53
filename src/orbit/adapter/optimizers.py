"""Many tasks trained at once: rows of different tasks in one batch, over one forward of the frozen base.

    optimizer = TaskOptimizers({"math": AdamW(…), "law": AdamW(…)}, clip=1.0, schedules={"law": CosineAnnealingLR(…)})

Each task learns as if it were alone. With l the losses of a window's rows or tokens, u the units that each
counts (1 for a supervised token, 0 for the others) and t a task, its own run would have the gradient

    g_t = ∇ Σ_{i∈t} u_i·l_i / n_t,     n_t = Σ_{i∈t} u_i        over the rows of t in the window

The rows of other tasks do not depend on its parameters, so one backward pass of Σ_i u_i·l_i serves all, and what
remains is to divide by the right number: a micro-batch of n units gives the mean over all n with the weight n
(`outcome`), its window Σ_i ∇(u_i·l_i)/N, and `step` multiplies by N/n_t. Then each task's gradient is clipped by its
own norm, its optimizer steps and its schedule follows. A task without a unit in the window stays as it is to the
last bit: parameters, optimizer state and schedule.

>>> import torch; from torch import nn; from orbit import adapter
>>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
>>> for task in ("math", "law"):
...     _ = adapter.inject(model, adapter.AdapterConfig(r=2), task)
>>> optimizer = TaskOptimizers(
...     {task: torch.optim.AdamW(adapter.adapter_parameters(model, task).values(), lr=lr)
...      for task, lr in {"math": 1e-2, "law": 3e-3}.items()}, clip=1.0)
>>> for rows in (["math", "law", "law"], ["math", "math", None]):
...     out = model(torch.ones(3, 4), task=rows)
...     losses = (out - torch.eye(3, 2)).square().mean(1)       # (rows,)
...     optimizer.outcome(losses, rows).loss.backward()
...     optimizer.step(); optimizer.zero_grad(); optimizer.stepped
('math', 'law')
('math',)

Under DDP (`find_unused_parameters=True`) n_t is over all ranks, as N has to be: each rank's loss is
Σ_i u_i·l_i/N times the number of ranks, by which DDP divides.

In an Engine it stands where an optimizer does, and the loop's body is
`engine.step_on(optimizer.outcome(losses, rows, labels != -100))`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from orbit.adapter.errors import ConfigError, TaskError
from orbit.adapter.routes.plan import PerRow
from orbit.core.outcome import Outcome
from orbit.core.ranks import shards
from orbit.core.runtime import world_size

Rows = Sequence["str | None"] | PerRow


class TaskOptimizers(Optimizer):
    """One optimizer per task, behind the face of one.

    Args:
        optimizers: a task's name → its optimizer, over its parameters alone.
        clip: largest norm of a task's gradient: one number for all tasks, one by name, or None.
        schedules: a task's name → a scheduler of its optimizer, stepped after each step of the task.

    Attributes:
        tasks: the names.
        stepped: the tasks that took part in the last step.

    Raises:
        ConfigError: two tasks share a parameter, a schedule is of another optimizer, a clip is no positive number.
        TaskError: a clip or schedule of no task here.
    """

    keeps_apart = True  # to the core: no clipping over all tasks, and no new parameters without saying whose

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        *,
        clip: float | Mapping[str, float | None] | None = None,
        schedules: Mapping[str, Any] | None = None,
    ) -> None:
        self._optimizers, self._schedules = dict(optimizers), dict(schedules or {})
        self._clip = dict(clip) if isinstance(clip, Mapping) else dict.fromkeys(optimizers, clip)
        self._check()
        self.stepped: tuple[str, ...] = ()
        self._units: dict[str, Tensor] = {}  # n_t of the open window
        self._built = False
        super().__init__([group for part in self._optimizers.values() for group in part.param_groups], {})
        self.state = _States(self._optimizers)  # type: ignore[assignment]
        self._built = True

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._optimizers)

    def _check(self) -> None:
        if not self._optimizers:
            raise ConfigError("TaskOptimizers needs at least one task: {name: optimizer}")
        for kind, given in (("clip", self._clip), ("schedules", self._schedules)):
            for task in given:
                if task not in self._optimizers:
                    raise TaskError(
                        f"{kind} names {task!r}; the tasks with optimizers are {list(self._optimizers)}"
                    )
        owner: dict[int, str] = {}
        for task, part in self._optimizers.items():
            if not isinstance(part, Optimizer):
                raise ConfigError(f"the optimizer of task {task!r} is {part!r}: pass a torch.optim.Optimizer")
            closure = inspect.signature(part.step).parameters.get("closure")
            if closure is not None and closure.default is closure.empty:
                raise ConfigError(f"task {task!r}: {type(part).__name__}.step() cannot do without closure=")
            for parameter in _parameters(part):
                if owner.setdefault(id(parameter), task) != task:
                    raise ConfigError(
                        f"tasks {owner[id(parameter)]!r} and {task!r} share a parameter {tuple(parameter.shape)}; "
                        "make each optimizer from adapter_parameters(model, task).values()"
                    )
        for task, limit in self._clip.items():
            if limit is not None and not limit > 0:
                raise ConfigError(
                    f"clip of task {task!r} is {limit!r}: it must be > 0, or None for no clipping"
                )
        for task, schedule in self._schedules.items():
            if getattr(schedule, "optimizer", None) is not self._optimizers[task]:
                raise ConfigError(f"the schedule of task {task!r} was not made from that task's optimizer")

    # -- the loss --------------------------------------------------------------------------------------------

    def outcome(self, losses: Tensor, tasks: Rows, units: Tensor | None = None) -> Outcome:
        """The loss of a micro-batch, whose gradient to each task becomes that of its own mean in `step`.

        Args:
            losses: (rows,) or (rows, positions), not reduced: `cross_entropy(…, reduction="none")`, say.
            tasks: the task of each row; rows of None train nothing.
            units: how much each of `losses` counts, of the same shape: `labels != -100` for tokens, the number of
                tokens where `losses` holds means of rows. None: 1 each.

        Returns:
            loss, the mean over the units, and weight, their number; for `engine.step_on`, or in a loop of your own
            `loss.backward()`, scaled by weight ÷ (the window's units) if a step follows several of them.

        Raises:
            TaskError: a task without an optimizer here. ValueError: shapes that do not fit.
        """
        sums, counts, names = per_row(losses, tasks, units)
        unknown = [task for task in names if task is not None and task not in self._optimizers]
        if unknown:
            raise TaskError(
                f"a row is of task {unknown[0]!r}, which has no optimizer; there are {list(self.tasks)}"
            )
        total = counts.sum()
        loss = sums.sum() / torch.where(total > 0, total, 1.0)
        if loss.grad_fn is not None:
            of_tasks = {task: counts[rows].sum() for task, rows in _rows_of(names).items()}
            loss.grad_fn.register_prehook(functools.partial(self._count, of_tasks))
        return Outcome(loss, total)

    def _count(self, units: Mapping[str, Tensor], *grads: Tensor) -> None:
        """A backward pass brings the gradients of so many units into the window."""
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            self._units.clear()  # a new window; the last one may have been dropped
        for task, count in units.items():
            self._units[task] = self._units.get(task, 0) + count

    # -- the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the tasks that took part in the window.

        A task takes part if `outcome` was given units of it, or, where `outcome` was not used, if a parameter has a
        gradient.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        units = self._read_units()
        stepped = []
        for task, part in self._optimizers.items():
            gradients = [p.grad for p in _parameters(part) if p.grad is not None]
            if not gradients:
                continue
            if units.get(task) == 0.0:
                part.zero_grad()  # nothing but zeros, which momentum and weight decay would make a step of
                continue
            if task in units and len(units) > 1:
                torch._foreach_mul_(gradients, sum(units.values()) / units[task])
            limit = self._clip.get(task)
            if limit is not None:
                nn.utils.clip_grad_norm_(_parameters(part), limit)
            part.step()
            if task in self._schedules:
                self._schedules[task].step()
            stepped.append(task)
        self.stepped = tuple(stepped)
        self._units.clear()
        return result

    def _read_units(self) -> dict[str, float]:
        """n_t on the host, over all ranks: one wait a step."""
        if world_size() == 1:
            if not self._units:
                return {}
            return dict(zip(self._units, torch.stack([*self._units.values()]).tolist(), strict=True))
        # A rank without a row of a task gets the task's gradient from the others, and must scale it as they do.
        device = _parameters(next(iter(self._optimizers.values())))[0].device
        exact = torch.float32 if device.type == "mps" else torch.float64
        total = torch.zeros(len(self._optimizers), dtype=exact, device=device)
        for index, task in enumerate(self._optimizers):
            total[index] += self._units.get(task, 0.0)
        dist.all_reduce(total)
        units = dict(zip(self._optimizers, total.tolist(), strict=True))
        return units if any(units.values()) else {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, and the window that they are of."""
        self._units.clear()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: a group belongs to a task's own optimizer, before this one is made."""
        if self._built:
            raise ConfigError(
                "add the parameters to their task's own optimizer, before TaskOptimizers is made"
            )
        super().add_param_group(param_group)

    # -- saved with the run ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of every task's optimizer and schedule, as plain values and tensors.

        Its `state` and `param_groups` are one optimizer's, task after task, to be saved and cut up like any.
        """
        states: dict[int, Any] = {}
        groups, tasks, first = [], dict[str, Any](), 0
        for task, part in self._optimizers.items():
            own = part.state_dict()
            states |= {first + number: entries for number, entries in own["state"].items()}
            for group in own["param_groups"]:
                groups.append({**group, "params": [first + number for number in group["params"]]})
            first += len(_parameters(part))
            tasks[task] = {
                "groups": len(own["param_groups"]),
                "schedule": self._schedules[task].state_dict() if task in self._schedules else None,
            }
        return {"state": states, "param_groups": groups, "tasks": tasks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()`.

        Raises:
            ValueError: it is of other tasks, schedules or parameters. Nothing has changed then.
        """
        saved = state_dict.get("tasks")
        if not isinstance(saved, Mapping) or set(saved) != set(self._optimizers):
            have = sorted(saved) if isinstance(saved, Mapping) else "none"
            raise ValueError(
                f"the state is of tasks {have}, and this optimizer has {sorted(self._optimizers)}"
            )
        parts = _by_task(state_dict)
        for task, part in self._optimizers.items():
            if (saved[task]["schedule"] is None) != (task not in self._schedules):
                raise ValueError(f"task {task!r} has a schedule in the state or here, and not in both")
            here, there = part.param_groups, parts[task]["param_groups"]
            if [len(group["params"]) for group in here] != [len(group["params"]) for group in there]:
                raise ValueError(f"the state of task {task!r} is of other parameters than its optimizer here")
        for task, part in self._optimizers.items():
            part.load_state_dict(shards.cut_optimizer_state(part, parts[task]))
            if task in self._schedules:
                self._schedules[task].load_state_dict(saved[task]["schedule"])
        self.param_groups = [group for part in self._optimizers.values() for group in part.param_groups]
        self._units.clear()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


def per_task_loss(losses: Tensor, tasks: Rows, units: Tensor | None = None) -> Tensor:
    """Σ over tasks of the mean of their losses, 0-d: its gradient to each task is that of its own mean.

    For a step after every batch and optimizers of your own; `TaskOptimizers.outcome` is also right where a step
    follows several batches. Arguments and errors as there.

    >>> losses = torch.tensor([1.0, 3.0, 5.0, 7.0])
    >>> per_task_loss(losses, ["a", "a", "b", None])
    tensor(7.)
    """
    sums, counts, names = per_row(losses, tasks, units)
    total = sums.sum() * 0.0
    for rows in _rows_of(names).values():
        count = counts[rows].sum()
        total = total + sums[rows].sum() / torch.where(count > 0, count, 1.0)
    return total


def per_row(
    losses: Tensor, tasks: Rows, units: Tensor | None
) -> tuple[Tensor, Tensor, tuple[str | None, ...]]:
    """Σ u·l and Σ u of each row, (rows,), zero in rows of None; and the rows' tasks."""
    names = tuple(tasks.tasks if isinstance(tasks, PerRow) else tasks)
    if losses.dim() not in (1, 2) or len(losses) != len(names):
        raise ValueError(
            f"losses {tuple(losses.shape)} must be (rows,) or (rows, positions) with a row for each of {len(names)} "
            'tasks: reduce nothing (reduction="none")'
        )
    if units is not None and units.shape != losses.shape:
        raise ValueError(f"units {tuple(units.shape)} must have the shape of losses {tuple(losses.shape)}")
    wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
    counts = torch.ones_like(wide) if units is None else units.to(wide)
    trains = torch.tensor([task is not None for task in names], device=losses.device)
    counts = torch.where(trains if losses.dim() == 1 else trains[:, None], counts.detach(), 0.0)
    sums = torch.where(counts > 0, wide * counts, 0.0)  # a position that does not count may be NaN
    return (sums, counts, names) if losses.dim() == 1 else (sums.sum(1), counts.sum(1), names)


def _rows_of(names: Sequence[str | None]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(names):
        if task is not None:
            rows.setdefault(task, []).append(row)
    return rows


def _parameters(part: Optimizer) -> list[Tensor]:
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _by_task(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each task's own `state_dict()` in that of all."""
    parts, groups, first = {}, iter(state["param_groups"]), 0
    for task, entry in state["tasks"].items():
        own = [next(groups) for _ in range(entry["groups"])]
        numbers = [number for group in own for number in group["params"]]
        parts[task] = {
            "state": {n - first: state["state"][n] for n in numbers if n in state["state"]},
            "param_groups": [{**group, "params": [n - first for n in group["params"]]} for group in own],
        }
        first += len(numbers)
    return parts


class _States(MutableMapping[Any, Any]):
    """The states of all tasks' parameters, each kept by its task's optimizer."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        self._optimizers = optimizers

    def _holder(self, parameter: Any) -> Any:
        for part in self._optimizers.values():
            if parameter in part.state:
                return part.state
        raise KeyError(parameter)

    def __getitem__(self, parameter: Any) -> Any:
        return self._holder(parameter)[parameter]

    def __setitem__(self, parameter: Any, value: Any) -> None:
        part = next(o for o in self._optimizers.values() if any(p is parameter for p in _parameters(o)))
        part.state[parameter] = value

    def __delitem__(self, parameter: Any) -> None:
        del self._holder(parameter)[parameter]

    def __iter__(self) -> Iterator[Any]:
        return iter([parameter for part in self._optimizers.values() for parameter in part.state])

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._optimizers.values())

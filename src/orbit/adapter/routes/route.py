"""Which tasks a model's adapted layers use, and for how long.

    set_route(model, "a")             until further notice, like PEFT's `set_adapter`
    with route(model, "a"): ...       inside the block
    model(x, task="a")                for one call, taken by a hook on the model that was grafted

"a" may also be None (the base model), a list with a name or None for every row of the batch, or, given as
`tasks=`, a list of names to add up or a dict of their weights: `plan.py` says what each of these computes. A new
task becomes current when it is injected. Layers read their plan from an attribute of their own, owner modules
and tensors, so that a compiled graph sees modules change and never a name.
One graph serves all tasks of equal shape, all sums of as many, and all assignments of as many tasks to the rows of
a batch. With one task per row another batch size is another graph, also under dynamic=True, unless
`torch._dynamo.config.force_nn_module_property_static_shapes` is False.

Threads may share a route but not change it under each other: a call that would is an error. `state.py` keeps
the books.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import ConfigError, RouteError, TaskError
from orbit.adapter.owners import Slot
from orbit.adapter.routes.plan import Route, as_route, names_in
from orbit.adapter.routes.state import RouteState

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft

TaskArgument: TypeAlias = "str | Sequence[str | None] | Route"
TasksArgument: TypeAlias = "Sequence[str] | Mapping[str, float] | None"


class route:
    """`with route(model, task):` the model uses `task` inside the block.

    It is also the way to generate: transformers' `generate` takes no keywords that the model's forward does not name.
    Rows then mean prompts, and the beams or samples of a prompt follow its task.

    Args:
        task: a task's name; None, the base model; or a list with one of these per row of the batch.
        tasks: instead of `task`, a list of tasks to add up, or a dict of their weights.

    Raises:
        TaskError: no such task. RouteError: no route, merged, or another thread is running the model.

    >>> with route(model, ["math", None]):          # doctest: +SKIP
    ...     model.generate(**two_prompts)
    """

    def __init__(self, model: nn.Module, task: TaskArgument = None, *, tasks: TasksArgument = None) -> None:
        self._route = as_route(task, tasks)
        self._state = state_of(model, self._route)

    def __enter__(self) -> None:
        self._state.enter(self._route, block=self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state._settle()
        self._state.leave(self)


def set_route(model: nn.Module, task: TaskArgument = None, *, tasks: TasksArgument = None) -> None:
    """Make a route the one that `model` uses outside of calls with `task=` and blocks; see `route`.

    Raises:
        TaskError: no such task. RouteError: no route, merged, or inside a call or block.
    """
    way = as_route(task, tasks)
    state_of(model, way).set_default(way)


def current_route(model: nn.Module) -> Route:
    """The route that `model` uses now: a task's name, None for the base model, or one of `plan.py`'s."""
    return state_of(model).current


# -- finding and installing ----------------------------------------------------------------------------------


def find_state(model: nn.Module, way: Route = None) -> RouteState | None:
    """The RouteState of a model, or None if nothing below it is adapted.

    A hook on the model answers at once, unless it does not know the tasks of the route `way`.

    Parts of a model that were adapted separately have one each; they are united here.

    Raises:
        TaskError: two parts have a task of the same name that differs in more than rank and alpha.
    """
    for hook in model._forward_pre_hooks.values():
        state = getattr(hook, "__self__", None)
        if isinstance(state, RouteState) and all(task in state.configs for task in names_in(way)):
            return state
    states: list[RouteState] = []
    grafts: dict[str, Graft] = {}
    for path, module in model.named_modules():
        state = module.__dict__.get("_orbit_route")
        if state is not None:
            grafts[path] = module
            if state not in states:
                states.append(state)
    if not states:
        return None
    first, *others = states
    united: dict[str, AdapterConfig] = {}
    for other in others:
        clash = [n for n, c in other.configs.items() if first.configs.get(n, c) != c and n not in united]
        united.update((name, _united(grafts, name)) for name in clash)
        if first.merged != other.merged or first._holds or other._holds:
            raise RouteError("parts of this model are merged or running; unmerge and finish them first")
    for other in others:
        first.configs.update({**other.configs, **united})
        first.pinned.update(other.pinned)
        _rehook(model, other, first)
    for layer in grafts.values():
        if layer.__dict__["_orbit_route"] is not first:
            layer.__dict__["_orbit_route"] = first
            first.attach(layer)
    return first


def _united(grafts: Mapping[str, Graft], task: str) -> AdapterConfig:
    """The one config of a task that parts of a model have each with their own."""
    layers = {path: layer.slots()[task] for path, layer in grafts.items() if task in layer.slots()}
    why = "a layer of one of them has more than a low-rank update"
    if all(isinstance(slot, Slot) for slot in layers.values()):
        try:
            configs = {path: grafts[path].settings(task) for path in layers}
            of_others = [
                c.dropout for path, c in configs.items() if not isinstance(grafts[path], nn.Embedding)
            ]
            for path in configs:
                if of_others and isinstance(grafts[path], nn.Embedding):  # it has no dropout to differ in
                    configs[path] = replace(configs[path], dropout=of_others[0])
            return AdapterConfig.of_layers(configs)
        except ConfigError as error:
            why = str(error)
    raise TaskError(
        f"there are different tasks named {task!r} ({why}) in parts of this model; give them different names"
    )


def state_of(model: nn.Module, way: Route = None) -> RouteState:
    """The RouteState of a model that has tasks.

    Raises:
        TaskError: the model has none.
    """
    state = find_state(model, way)
    if state is None:
        raise TaskError(f"{type(model).__name__} has no adapters; inject some first")
    return state


def install(model: nn.Module, state: RouteState) -> None:
    """Hook `state` to the model, once, so that its calls take `task=` and `tasks=`."""
    if all(getattr(hook, "__self__", None) is not state for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(state.pre_forward, with_kwargs=True)
        model.register_forward_hook(state.post_forward, always_call=True)


def uninstall(model: nn.Module, state: RouteState) -> None:
    """Take the hooks of `state` off every module of the model."""
    _rehook(model, state, None)


def _rehook(model: nn.Module, old: RouteState, new: RouteState | None) -> None:
    for module in model.modules():
        ours = [k for k, h in module._forward_pre_hooks.items() if getattr(h, "__self__", None) is old]
        for key in ours:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [k for k, h in module._forward_hooks.items() if getattr(h, "__self__", None) is old]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
        if ours and new is not None:
            install(module, new)

"""Which task a model's adapted layers use, and for how long.

    set_route(model, "a")             until further notice, like PEFT's `set_adapter`
    with route(model, "a"): ...       inside the block
    model(x, task="a")                for one call, taken by a hook on the model that was grafted

None is the base model. A new task becomes current when it is injected. Layers read their owners from an
attribute of their own, a `Slot` or None, so that a compiled graph sees modules change and never a name.
Threads may share a route but not change it under each other: a call that would is an error. `state.py` keeps
the books.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from torch import nn

from orbit.adapter.errors import RouteError, TaskError
from orbit.adapter.state import RouteState

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft


class route:
    """`with route(model, task):` the model uses `task` (None: the base model) inside the block.

    Raises:
        TaskError: no such task. RouteError: merged, or another thread is running the model.

    >>> with route(model, "math"):          # doctest: +SKIP
    ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module, task: str | None) -> None:
        self._state = state_of(model, task)
        self._task = task

    def __enter__(self) -> None:
        self._state.enter(self._task)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state._settle()
        self._state.leave()


def set_route(model: nn.Module, task: str | None) -> None:
    """Make `task` (None: the base model) the one that `model` uses outside of calls with `task=` and blocks.

    Raises:
        TaskError: no such task. RouteError: merged, or inside a call or block.
    """
    state_of(model, task).set_default(task)


def current_route(model: nn.Module) -> str | None:
    """The task that `model` uses now; None is the base model."""
    return state_of(model).current


# -- finding and installing ----------------------------------------------------------------------------------


def find_state(model: nn.Module, task: str | None = None) -> RouteState | None:
    """The RouteState of a model, or None if nothing below it is adapted.

    A hook on the model answers at once, unless it does not know the `task` that is looked for.

    Parts of a model that were adapted separately have one each; they are united here.

    Raises:
        TaskError: two parts have a task of the same name with different configs.
    """
    for hook in model._forward_pre_hooks.values():
        state = getattr(hook, "__self__", None)
        if isinstance(state, RouteState) and (task is None or task in state.configs):
            return state
    states: list[RouteState] = []
    grafts: list[Graft] = []
    for module in model.modules():
        state = module.__dict__.get("_orbit_route")
        if state is not None:
            grafts.append(module)  # type: ignore[arg-type]
            if state not in states:
                states.append(state)
    if not states:
        return None
    first, *others = states
    for other in others:
        clash = [n for n, c in other.configs.items() if first.configs.get(n, c) != c]
        if clash:
            raise TaskError(
                f"parts of this model have different tasks named {clash[0]!r}; rename one of them"
            )
        if first.merged != other.merged or first._holds or other._holds:
            raise RouteError("parts of this model are merged or running; unmerge and finish them first")
    for other in others:
        first.configs.update(other.configs)
        _rehook(model, other, first)
    for layer in grafts:
        if layer.__dict__["_orbit_route"] is not first:
            layer.__dict__["_orbit_route"] = first
            first.attach(layer)
    return first


def state_of(model: nn.Module, task: str | None = None) -> RouteState:
    """The RouteState of a model that has tasks.

    Raises:
        TaskError: the model has none.
    """
    state = find_state(model, task)
    if state is None:
        raise TaskError(f"{type(model).__name__} has no adapters; inject some first")
    return state


def install(model: nn.Module, state: RouteState) -> None:
    """Hook `state` to the model, once, so that its calls take `task=`."""
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

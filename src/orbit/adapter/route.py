"""Which task a model's adapted layers use, and for how long.

Every model replica has one RouteState. Its layers read their current owners from an attribute of their own, a
`Slot` or None, so that a compiled graph sees modules change and never a name; the RouteState sets them:

    set_route(model, "a")             until further notice, like PEFT's `set_adapter`
    with route(model, "a"): ...       inside the block
    model(x, task="a")                for one call, taken by a hook on the model that was grafted

None is the base model. A new task becomes current when it is injected. Threads may share a route but not change it
under each other: a call that would is an error. In a backward pass nothing is switched; a replayed layer asks
`replay.History` what its forward saw.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import RouteError, TaskError
from orbit.adapter.owners import Slot
from orbit.adapter.replay import History, in_backward

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft


class _Hold(NamedTuple):
    """One call or block that relies on the current route."""

    thread: int
    changes: bool  # did it ask for a task of its own?
    task: str | None
    before: str | None
    replaying: bool  # entered inside a backward pass, where nothing is switched
    root: weakref.ref[nn.Module] | None  # of a call: the model called


class RouteState:
    """The tasks of one model replica and the one that is current.

    Copies and pickles keep the tasks and the default route, and drop what belongs to a running call. Layers find
    their copy's RouteState by themselves when they are rebuilt.

    Attributes:
        configs: the config of every task, in the order of injection.
        default: the task that is current outside of calls and blocks.
        current: the task that is current now.
        merged: the task that is merged into the weights, if any.
        routed: tasks that ran with gradients since the last `check_gradients`.
    """

    def __init__(self) -> None:
        self.configs: dict[str, AdapterConfig] = {}
        self.default: str | None = None
        self.merged: str | None = None
        self._start()

    def _start(self) -> None:
        self.current = self.default
        self.routed: set[str] = set()
        self.calls = 0  # running calls with task=, read by compiled graphs
        self._layers: list[weakref.ref[Graft]] = []
        self._lost: list[str] = []  # layers that died with their tasks
        self._holds: list[_Hold] = []
        self._history = History(self.current)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"configs": dict(self.configs), "default": self.default, "merged": self.merged}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # -- layers ----------------------------------------------------------------------------------------------

    def layers(self) -> Iterator[Graft]:
        """The adapted layers that are still alive."""
        for ref in self._layers:
            layer = ref()
            if layer is not None:
                yield layer

    def attach(self, layer: Graft) -> None:
        self.detach(layer)
        me, what = weakref.ref(self), f"{type(layer).__name__}({layer.extra_repr()})"

        def gone(_: object) -> None:
            state = me()
            if state is not None:
                state._lost.append(what)

        self._layers.append(weakref.ref(layer, gone))
        self._point(layer)

    def detach(self, layer: Graft) -> None:
        self._layers = [ref for ref in self._layers if ref() not in (None, layer)]

    def _refuse_loss(self) -> None:
        if self._lost:
            raise RouteError(
                f"{len(self._lost)} layer(s) with adapters left the model, the first a {self._lost[0]}: replaced by "
                "resize_token_embeddings, say. Resize before injecting; if it was meant, set_route(model, task) again"
            )

    def _point(self, layer: Graft) -> None:
        task = None if self.merged is not None else self.current
        layer.__dict__["_orbit_slot"] = None if task is None else layer.slots().get(task)

    @property
    def busy(self) -> bool:
        """Is a call or a block running?"""
        self._settle()
        return bool(self._holds)

    # -- switching -------------------------------------------------------------------------------------------

    def set_default(self, task: str | None) -> None:
        """Make `task` current until further notice.

        Raises:
            TaskError: no such task. RouteError: inside a call or block, or while merged.
        """
        self._check(task)
        with self._lock:
            self._settle()
            if self._holds:
                raise RouteError(
                    f"the default route cannot become {task!r} while a call or a `with route` is running"
                )
            self._lost.clear()
            self.default = task
            self._switch(task)

    def set_merged(self, task: str | None) -> None:
        """`task` was merged into the weights (None: unmerged), so that its branch rests."""
        self.merged = task
        for layer in self.layers():
            self._point(layer)

    def enter(self, task: str | None, *, changes: bool = True, root: nn.Module | None = None) -> None:
        """Start a call or a block; `leave` ends it. With `changes` False it takes the current route as it is."""
        self._refuse_loss()
        if changes:
            self._check(task)
        me, replaying = threading.get_ident(), in_backward()
        with self._lock:
            self._settle(root)
            if not replaying:
                self._refuse_others(me, task, changes)
            ref = None if root is None else weakref.ref(root)
            self._holds.append(_Hold(me, changes, task, self.current, replaying, ref))
            if replaying:
                return
            if changes:
                self._switch(task)
            else:
                self._history.note(self.current)
            if root is not None and root.training and self.current is not None and torch.is_grad_enabled():
                self.routed.add(self.current)

    def leave(self) -> None:
        """End this thread's last call or block and put back the route that it found."""
        me = threading.get_ident()
        with self._lock:
            for index in range(len(self._holds) - 1, -1, -1):
                if self._holds[index].thread == me:
                    hold = self._holds.pop(index)
                    if hold.changes and not hold.replaying:
                        self._switch(hold.before)
                    return

    def slot_in_backward(self, layer: Graft) -> Slot | None:
        """What a layer uses when it runs inside a backward pass: the route of its forward."""
        for hold in reversed(self._holds):
            if hold.replaying and hold.changes and hold.thread == threading.get_ident():
                task = hold.task
                break
        else:
            task = self._history.task_of_replay()
        return None if task is None or self.merged is not None else layer.slots().get(task)

    def _check(self, task: str | None) -> None:
        if task is not None and not isinstance(task, str):
            raise RouteError(f"a route is a task's name or None for the base model, got {task!r}")
        if task is not None and task not in self.configs:
            raise TaskError(f"there is no task {task!r}; the model has {list(self.configs)}")
        if self.merged is not None:
            raise RouteError(
                f"task {self.merged!r} is merged into the weights, so {task!r} cannot be routed; unmerge first"
            )

    def _refuse_others(self, me: int, task: str | None, changes: bool) -> None:
        for hold in self._holds:
            if hold.thread != me and not hold.replaying and (changes or hold.changes):
                theirs = f"task {hold.task!r}" if hold.changes else f"the default {self.current!r}"
                mine = f"task {task!r}" if changes else f"the default {self.default!r}"
                raise RouteError(
                    f"thread {me} asks for {mine} while thread {hold.thread} runs this model under {theirs}; "
                    "one route at a time per replica: take turns, or give each thread copy.deepcopy(model)"
                )

    def _switch(self, task: str | None) -> None:
        self.current = task
        for layer in self.layers():
            self._point(layer)
        self._history.note(task)

    def _settle(self, root: nn.Module | None = None) -> None:
        """Drop this thread's calls that ended without `leave`.

        torch runs always_call hooks on every Exception, but not on a KeyboardInterrupt. A call is over when its
        model is no longer on the stack.
        """
        me = threading.get_ident()
        if not any(hold.thread == me and hold.root is not None for hold in self._holds):
            return
        running = _running_models()
        if root is not None and root in running:
            running.remove(root)  # the call that is just starting
        stale = None
        for index, hold in enumerate(self._holds):
            if hold.thread != me or hold.root is None:
                continue
            model = hold.root()
            if model is not None and model in running:
                running.remove(model)
            elif stale is None:
                stale = index
        if stale is not None:
            before = self._holds[stale].before
            self._holds = [h for i, h in enumerate(self._holds) if i < stale or h.thread != me]
            self.calls = sum(hold.changes and hold.root is not None for hold in self._holds)
            self._switch(before)

    # -- the hooks on the model's root -----------------------------------------------------------------------

    def pre_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take `task=` out of a call's keywords. Compiled graphs see nothing of a call without it."""
        if torch.compiler.is_compiling() and "task" not in kwargs:
            return None
        return self._enter_call(model, args, kwargs)

    def post_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Release the call's route; runs always, also when the forward raised."""
        if torch.compiler.is_compiling() and not self.calls:
            return
        self._leave_call(model)

    @torch.compiler.disable
    def _enter_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "task" not in kwargs or own_task_argument(type(model)):
            self._guarded_enter(None, model, changes=False)
            return None
        kwargs = dict(kwargs)
        self._guarded_enter(kwargs.pop("task"), model, changes=True)
        return args, kwargs

    def _guarded_enter(self, task: str | None, model: nn.Module, *, changes: bool) -> None:
        try:
            self.enter(task, changes=changes, root=model)
        except BaseException:
            # torch runs the post-hook even if this hook raised: give it a hold of its own to take away.
            with self._lock:
                self._holds.append(
                    _Hold(threading.get_ident(), False, None, self.current, True, weakref.ref(model))
                )
            raise
        self.calls += changes

    @torch.compiler.disable
    def _leave_call(self, model: nn.Module) -> None:
        me = threading.get_ident()
        last = next((h for h in reversed(self._holds) if h.thread == me), None)
        if last is not None and last.root is not None and last.root() is model:
            self.calls -= last.changes
            self.leave()


class route:
    """`with route(model, task):` the model's adapted layers use `task` (None: the base model) inside the block.

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


@functools.cache
def own_task_argument(cls: type[nn.Module]) -> bool:
    """Does the class's forward have a parameter `task` of its own? Then the keyword is the model's."""
    return "task" in inspect.signature(cls.forward).parameters


def _running_models() -> list[nn.Module]:
    """The modules whose `__call__` is on this thread's stack, innermost first."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found

"""The state behind a model's route: its tasks, the current one, and who relies on it.

Every model replica has one RouteState; `route.py` is its face. It tells each layer its plan,
counts the calls and blocks that rely on that, and refuses what would change it under them. Its bound methods
are the hooks on the model's root (closures could not be pickled with the model).

In a backward pass nothing is switched: a replayed layer asks `replay.History` what its forward saw. A
compiled layer cannot ask. So if some of the model is compiled, the outputs of a call carry a hook that shows
the call's task to the layers while the backward pass runs.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import RouteError, TaskError
from orbit.adapter.owners import Tasks
from orbit.adapter.routes.batch import Batch, batch_of, order_of
from orbit.adapter.routes.plan import (
    PerRow,
    Plan,
    Route,
    Scaled,
    Spread,
    as_route,
    describe,
    names_in,
    own,
    plan_of,
    renamed,
)
from orbit.adapter.routes.ranks import elsewhere, may_differ
from orbit.adapter.routes.replay import History, in_backward

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft


_Inputs: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graphs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.disable`, applied at the first call: it imports the compiler, which takes a second."""
    disabled: list[Callable[_P, _R]] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


class _Hold(NamedTuple):
    """One call or block that relies on the current route."""

    thread: int
    changes: bool  # did it ask for a route of its own?
    route: Route
    before: Route
    replaying: bool  # entered inside a backward pass, where nothing is switched
    root: weakref.ref[nn.Module] | None  # of a call: the model called
    batch: Batch | None = None  # of a call under one task per row
    block: object | None = None  # of a block: who began it


class RouteState:
    """The tasks of one model replica and the one that is current.

    Copies and pickles keep the tasks and the default route, and drop what belongs to a running call. Layers
    find their copy's RouteState by themselves when they are rebuilt.

    Attributes:
        configs: the config of every task, in the order of injection.
        default: the task that is current outside of calls and blocks.
        current: the task that is current now.
        merged: the task that is merged into the weights, if any.
        pinned: tasks that something else counts on, and what: they keep their names, and nothing is merged.
        routed: tasks whose calls a backward pass has reached since the last `check_gradients`.
    """

    def __init__(self) -> None:
        self.configs: dict[str, AdapterConfig] = {}
        self.default: Route = None
        self.merged: str | None = None
        self.pinned: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        self.current = self.default
        self.routed: set[str] = set()
        self.calls = 0  # running calls with task=, read by compiled graphs
        self._layers: dict[int, weakref.ref[Graft]] = {}
        self._orders: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._lost: list[str] = []  # layers that died with their tasks
        self._holds: list[_Hold] = []
        self.owner: int | None = None  # the thread whose call or block chose the current task
        self._shown = self.current  # the task whose owners the layers have
        self._history = History(self.current)
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "configs": dict(self.configs),
            "default": self.default,
            "merged": self.merged,
            "pinned": dict(self.pinned),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    # -- layers ----------------------------------------------------------------------------------------------

    def layers(self) -> Iterator[Graft]:
        """The adapted layers that are still alive."""
        for ref in list(self._layers.values()):
            layer = ref()
            if layer is not None:
                yield layer

    def attach(self, layer: Graft) -> None:
        """Steer this layer from now on."""
        me, key, what = weakref.ref(self), id(layer), f"{type(layer).__name__}({layer.extra_repr()})"

        def gone(ref: object) -> None:
            state = me()
            if state is not None and state._layers.get(key) is ref:
                del state._layers[key]
                state._lost.append(what)

        self._layers[key] = weakref.ref(layer, gone)
        self._orders.clear()
        self._point(layer)

    def detach(self, layer: Graft) -> None:
        """Let go of a layer that loses its last task."""
        self._layers.pop(id(layer), None)

    def _refuse_loss(self) -> None:
        if self._lost:
            raise RouteError(
                f"{len(self._lost)} layer(s) with adapters left the model, the first a {self._lost[0]}: "
                "replaced by resize_token_embeddings, say. Resize before injecting; if it was meant, "
                "set_route(model, task) again"
            )

    def _point(self, layer: Graft) -> None:
        layer.point(None if self.merged is not None else self._shown)

    def refuse_pinned(self, task: str) -> None:
        """TaskError if something counts on this task."""
        if task in self.pinned:
            raise TaskError(f"task {task!r} is {self.pinned[task]}, and keeps its place and name until then")

    def refuse_lost_gradient(self, layer: nn.Module) -> None:
        """RouteError for a layer that runs without gradient under scalings that a router computed with one."""
        route = own(self._shown)
        if isinstance(route, Scaled) and route.scalings.grad_fn is not None:
            raise RouteError(
                f"layer {self.name_of(layer)} runs without gradient under scalings whose router needs one, which "
                "would be lost: reentrant activation checkpointing does so; use use_reentrant=False"
            )

    def name_of(self, layer: nn.Module) -> str:
        """The dotted name of a layer in the model of the running call, for messages; its class where there is none."""
        for hold in reversed(self._holds):
            root = None if hold.root is None else hold.root()
            for path, module in () if root is None else root.named_modules():
                if module is layer:
                    return repr(path)
        return f"a {type(layer).__name__}"

    @property
    def busy(self) -> bool:
        """Is a call or a block running?"""
        self._settle()
        return bool(self._holds)

    def is_chosen(self) -> bool:
        """Did somebody choose the current route, by a call, a block or the default? A default of None is no choice."""
        return self.default is not None or any(hold.changes for hold in self._holds)

    # -- switching -------------------------------------------------------------------------------------------

    def set_default(self, route: Route) -> None:
        """Make `route` current until further notice.

        Raises:
            TaskError: no such task. RouteError: inside a call or block, or while merged.
        """
        self._check(route)
        with self._lock:
            self._settle()
            if self._holds:
                raise RouteError(
                    f"the default cannot become {describe(route)} while a call or a `with route` is running"
                )
            self._lost.clear()
            self.default = route
            self._switch(route)

    def rename(self, old: str, new: str) -> None:
        """Task `old`, whose owners bear the name `new` by now, is called so everywhere."""
        self.configs = {new if name == old else name: config for name, config in self.configs.items()}
        self.routed = {new if name == old else name for name in self.routed}
        self.default = renamed(self.default, old, new)
        self._history.rename(old, new)
        self._switch(self.default)

    def set_merged(self, task: str | None) -> None:
        """`task` was merged into the weights (None: unmerged), so that its branch rests."""
        self.merged = task
        for layer in self.layers():
            self._point(layer)

    def enter(
        self,
        route: Route,
        *,
        changes: bool = True,
        root: nn.Module | None = None,
        inputs: _Inputs | None = None,
        block: object | None = None,
    ) -> None:
        """Start a call (of `root` with `inputs`) or a block, whose beginner is `block`; `leave` ends it.

        Without `changes` it takes the route as it is.
        """
        self._refuse_loss()
        if changes:
            self._check(route)
        me, replaying = threading.get_ident(), in_backward()
        with self._lock:
            self._settle(root)
            if not replaying:
                self._refuse_others(me, route, changes)
            batch = None
            if root is not None and inputs is not None and not replaying:
                batch = self._batch(route if changes else self.current, changes, root, inputs)
            ref = None if root is None else weakref.ref(root)
            self._holds.append(_Hold(me, changes, route, self.current, replaying, ref, batch, block))
            if replaying:
                return
            if changes:
                self.owner = me
                self._switch(route)
            else:
                if self._shown != self.current:  # a backward pass failed before it could put this right
                    self._show(self.current)
                self._history.note(self.current)

    def leave(self, block: object | None = None) -> None:
        """End the last block that `block` began, or this thread's last call, and put back the route that it found.

        Raises:
            RouteError: another block began inside of it and goes on.
        """
        me = threading.get_ident()
        with self._lock:
            for index in range(len(self._holds) - 1, -1, -1):
                hold = self._holds[index]
                if hold.block is block and (block is not None or hold.thread == me):
                    del self._holds[index]
                    self._find_owner()
                    if hold.changes and not hold.replaying:
                        self._put_back(hold, index)
                    return

    def _put_back(self, hold: _Hold, index: int) -> None:
        """The route that `hold`, which was the one of this index, found is current again, if none is inside of it."""
        for later in range(index, len(self._holds)):
            inner = self._holds[later]
            if inner.changes and not inner.replaying:
                self._holds[later] = inner._replace(before=hold.before)
                raise RouteError(
                    f"the block of {describe(hold.route)} ended while the one of {describe(inner.route)}, which began "
                    "inside of it, goes on: blocks of coroutines or generators ran into each other. Keep a model's "
                    "route through no await or yield, or give each copy.deepcopy(model)"
                )
        self._switch(hold.before)

    def _batch(self, route: Route, changes: bool, root: nn.Module, inputs: _Inputs) -> Batch | None:
        route = own(route)
        if not isinstance(route, PerRow):
            return None
        outer = None if changes else self._running_batch()
        if outer is not None:
            return outer
        if root not in self._orders:
            self._orders[root] = order_of(root)
        return batch_of(root, *inputs, len(route.tasks), self._orders[root])

    def _running_batch(self) -> Batch | None:
        me = threading.get_ident()
        return next((hold.batch for hold in reversed(self._holds) if hold.thread == me), None)

    def check_rows(self, shape: torch.Size, axis: int) -> None:
        """RouteError unless a layer's input has the rows of the running call, as far as its shape can tell.

        A replay is not looked at: its forward was.
        """
        batch = None if in_backward() else self._running_batch()
        if batch is not None:
            batch.check(shape, axis)

    def plan_in_backward(self, layer: Graft) -> Plan:
        """What a layer uses when it runs inside a backward pass: the route of its forward."""
        for hold in reversed(self._holds):
            if hold.replaying and hold.changes and hold.thread == threading.get_ident():
                route = hold.route
                break
        else:
            route = self._history.route_of_replay()
        for task in names_in(route):
            if task not in self.configs:
                raise RouteError(
                    f"a forward is replayed that ran under task {task!r}, which was removed since; remove it after "
                    "the backward pass"
                )
        return None if self.merged is not None else plan_of(route, layer)

    def _check(self, route: Route) -> None:
        for task in names_in(route):
            if task not in self.configs:
                raise TaskError(f"there is no task {task!r}; the model has {list(self.configs)}")
        if self.merged is not None:
            raise RouteError(
                f"task {self.merged!r} is merged into the weights, so {describe(route)} has no route; unmerge first"
            )

    def _find_owner(self) -> None:
        self.owner = next((h.thread for h in self._holds if h.changes and not h.replaying), None)

    def refuse_stranger(self) -> None:
        """An adapted layer runs in this thread: is it under another thread's task?"""
        if self.owner is not None and self.owner != threading.get_ident():
            self._refuse_others(threading.get_ident(), self.default, False)

    def _refuse_others(self, me: int, route: Route, changes: bool, *, calls_only: bool = False) -> None:
        for hold in self._holds:
            if hold.root is None and calls_only:
                continue
            if hold.thread != me and not hold.replaying and (changes or hold.changes):
                theirs = describe(hold.route) if hold.changes else f"the default, {describe(self.current)}"
                mine = describe(route) if changes else f"the default, {describe(self.default)}"
                raise RouteError(
                    f"thread {me} asks for {mine} while thread {hold.thread} runs this model under {theirs}; "
                    "one route at a time per replica: take turns, or give each thread copy.deepcopy(model)"
                )

    def _switch(self, route: Route) -> None:
        self.current = route
        self._show(route)
        self._history.note(route)

    def _show(self, route: Route) -> None:
        if route is None and self._shown is None:
            return  # the layers have no plans, whatever tasks have come or gone
        self._shown = route
        for layer in self.layers():
            self._point(layer)

    def _settle(self, root: nn.Module | None = None) -> None:
        """Drop this thread's calls that ended without `leave`.

        torch runs always_call hooks on every Exception, but not on a KeyboardInterrupt. A call is over when
        its model is no longer on the stack.
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
            self._find_owner()
            self.calls = sum(hold.changes and hold.root is not None for hold in self._holds)
            self._switch(before)

    # -- the hooks on the model's root -----------------------------------------------------------------------

    def pre_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take `task=` or `tasks=` out of a call's keywords. Compiled graphs see nothing of a call without."""
        if torch.compiler.is_compiling() and "task" not in kwargs and "tasks" not in kwargs:
            return None
        return self._enter_call(model, args, kwargs)

    def post_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Release the call's route; runs always, also when the forward raised."""
        if torch.compiler.is_compiling() and not self.calls:
            return
        self._leave_call(model, output)

    @outside_graphs
    def _enter_call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {key: kwargs[key] for key in _ARGUMENTS - own_arguments(type(model)) if key in kwargs}
        inputs = (args, {key: value for key, value in kwargs.items() if key not in given})
        self._guarded_enter(given, model, inputs)
        return inputs if given else None

    def _guarded_enter(self, given: dict[str, Any], model: nn.Module, inputs: _Inputs) -> None:
        try:
            route = as_route(**given) if given else self.current
            others = self._others(model, route) if may_differ() else ()
            if others:
                given, route = {"task": route}, Spread(own(route), others)
            self.enter(route, changes=bool(given), root=model, inputs=inputs)
        except BaseException:
            # torch runs the post-hook even if this hook raised: give it a hold of its own to take away.
            with self._lock:
                self._holds.append(
                    _Hold(threading.get_ident(), False, None, self.current, True, weakref.ref(model))
                )
            raise
        self.calls += bool(given)

    def _others(self, model: nn.Module, route: Route) -> tuple[str, ...]:
        """What only other ranks use in the call of `model` that begins; inside a call that was asked already."""
        me = threading.get_ident()
        self._settle(model)
        if in_backward() or any(hold.thread == me and hold.root is not None for hold in self._holds):
            return ()
        return elsewhere(model, names_in(route), tuple(self.configs))

    @outside_graphs
    def _leave_call(self, model: nn.Module, output: Any) -> None:
        me = threading.get_ident()
        if torch.is_grad_enabled() and not in_backward():
            self._watch(model, [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad])
        last = next((h for h in reversed(self._holds) if h.thread == me), None)
        if last is not None and last.root is not None and last.root() is model:
            self.calls -= last.changes
            self.leave()

    # -- the hooks on a call's outputs -----------------------------------------------------------------------

    def _watch(self, model: nn.Module, outputs: list[Tensor]) -> None:
        names = names_in(self.current) if model.training else ()
        hooks: list[Callable[..., None]] = []
        if names:
            hooks.append(functools.partial(self._reached, names))
        if outputs and has_compiled_parts(model):
            hooks.append(functools.partial(self._begin_backward, self.current))
        for hook in hooks:
            for node in {output.grad_fn for output in outputs if output.grad_fn is not None}:
                node.register_prehook(hook)  # not on the tensor, which could then not be pickled

    def _reached(self, names: tuple[str, ...], *grads: Tensor) -> None:
        self.routed.update(names)

    def _begin_backward(self, route: Route, *grads: Tensor) -> None:
        if self._shown == route:
            return
        with self._lock:
            # Blocks do not count: the thread that waits for this backward pass may hold one.
            self._refuse_others(threading.get_ident(), route, True, calls_only=True)
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._show(route)

    def _end_backward(self) -> None:
        if self._shown != self.current:
            self._show(self.current)


def has_compiled_parts(model: nn.Module) -> bool:
    """Is any module of the model compiled by itself? Asked at every call that trains, so it skips the adapters."""
    left, seen = [model], {model}
    while left:
        module = left.pop()
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            return True
        for child in module._modules.values():
            if child is not None and type(child) is not Tasks and child not in seen:
                seen.add(child)
                left.append(child)
    return False


def own_arguments(cls: type[nn.Module]) -> frozenset[str]:
    """Which of `task` and `tasks` are parameters of the class's own forward: those are the model's."""
    if cls not in _OWN_ARGUMENTS:
        _OWN_ARGUMENTS[cls] = frozenset(_ARGUMENTS & set(inspect.signature(cls.forward).parameters))
    return _OWN_ARGUMENTS[cls]


_ARGUMENTS = frozenset({"task", "tasks"})
_OWN_ARGUMENTS: dict[type[nn.Module], frozenset[str]] = {}


def _running_models() -> list[nn.Module]:
    """The modules whose `__call__` is on this thread's stack, innermost first."""
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found

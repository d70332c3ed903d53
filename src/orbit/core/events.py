"""The loop, drawn once, with its events in place; and `Plugin`, which listens to them.

    build                           data → model → optimizer → scheduler → scaler → hooks
        build_model                 change trainer.model here: adapters, freezing
        restore                     all is built: load a checkpoint here
    before_train
        before_epoch
            before_step             the first micro-batch of a window is at hand
                before_batch
                    ┌──────────── the body: yours under Engine, forward() under BaseTrainer
                    │  loss, backward
                    │      before_optimizer_step     window full; gradients are final
                    │      after_optimizer_step
                    │      step_dropped              instead: the gradient was not finite
                    │  before_eval · after_eval      where the body (or a plugin) calls eval()
                    │  after_eval_batch              in eval(), when the body is done with a batch
                    │  leave_eval                    always, when eval() is left
                    └────────────
                after_batch
            after_step              the step is done and the body too: save here
        after_epoch
    after_train                     the run reached its end (or was asked to stop)
    stop                            the body left the loop early
    exception                       something raised; it reaches the user unchanged
    close                           always, last

    log · log_images                whenever trainer.log(...) is called
    state_dict · load_state_dict    whenever a checkpoint is made or read

An event `x` calls `on_x(trainer, ...)`. Only plugins that override a method are called, so an event that nobody
listens to costs one dictionary look-up. `before_epoch` is not repeated when a run resumes in the middle of an
epoch, and `after_epoch` is not repeated when it resumes behind one.

Plugins run in the order of `priority` (transforms < meters < monitors < checkpoints), and in the order given
among equals, so that the position of, say, a checkpoint in the user's list does not change what it saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbit.core.base import Base
    from orbit.core.loop import Core


class Plugin:
    """Base class of everything that listens to the loop. Under its documented name, `BaseHook`.

    Override any `on_<event>(self, trainer)`; the module docstring draws when each is called. An exception
    raised here reaches the user unchanged.

    >>> class Count(Plugin):
    ...     steps = 0
    ...     def on_after_step(self, trainer):
    ...         self.steps += 1
    """

    TRANSFORM, METER, MONITOR, CHECKPOINT = 0, 100, 200, 300
    priority: int = MONITOR
    writes: bool = False  # all it does is to write files or to talk to a service: left out of a fast_dev_run

    # building
    def on_build_model(self, trainer: Core) -> None: ...
    def on_restore(self, trainer: Core) -> None: ...

    # the loop
    def on_before_train(self, trainer: Core) -> None: ...
    def on_after_train(self, trainer: Core) -> None: ...
    def on_before_epoch(self, trainer: Core) -> None: ...
    def on_after_epoch(self, trainer: Core) -> None: ...
    def on_before_step(self, trainer: Core) -> None: ...
    def on_after_step(self, trainer: Core) -> None: ...
    def on_before_batch(self, trainer: Core) -> None: ...
    def on_after_batch(self, trainer: Core) -> None: ...
    def on_before_optimizer_step(self, trainer: Core) -> None: ...
    def on_after_optimizer_step(self, trainer: Core) -> None: ...
    def on_step_dropped(self, trainer: Core) -> None: ...
    def on_before_eval(self, trainer: Core) -> None: ...
    def on_after_eval_batch(self, trainer: Core) -> None: ...
    def on_after_eval(self, trainer: Core) -> None: ...
    def on_leave_eval(self, trainer: Core) -> None: ...

    # ways out
    def on_stop(self, trainer: Core) -> None: ...
    def on_exception(self, trainer: Core, exception: BaseException) -> None: ...
    def on_close(self, trainer: Core) -> None: ...

    # talking and remembering
    def on_log(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None: ...
    def on_log_images(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None: ...
    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None: ...
    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None: ...


BaseHook = Plugin

EVENTS: tuple[str, ...] = tuple(name.removeprefix("on_") for name in vars(Plugin) if name.startswith("on_"))


class Dispatcher:
    """Who listens to what, in order. `handlers[event]` is a list of bound methods; with `dry_run`, plugins that
    write are left out."""

    def __init__(self, plugins: Iterable[Plugin], dry_run: bool = False) -> None:
        self.dry_run = dry_run
        self.plugins: list[Plugin] = []
        self.handlers: dict[str, list[Callable[..., None]]] = {event: [] for event in EVENTS}
        for plugin in plugins:
            self.add(plugin)

    def add(self, plugin: Plugin) -> bool:
        """Listen on behalf of `plugin`; False if it is left out. TypeError if it is no Plugin, ValueError if it is
        already here.
        """
        if not isinstance(plugin, Plugin):
            hint = ": pass an instance, not the class" if isinstance(plugin, type) else ""
            raise TypeError(f"{plugin!r} is no orbit Plugin (BaseHook){hint}")
        if any(plugin is other for other in self.plugins):
            raise ValueError(
                f"{type(plugin).__name__} was attached twice: the same object is already a plugin"
            )
        for name in dir(type(plugin)):
            if name.startswith("on_") and name.removeprefix("on_") not in self.handlers:
                warnings.warn(
                    f"{type(plugin).__name__}.{name} is never called: there is no such event; "
                    f"known: {', '.join(EVENTS)}",
                    stacklevel=3,
                )
        if self.dry_run and plugin.writes:
            return False
        self.plugins.append(plugin)
        self.plugins.sort(key=lambda p: p.priority)
        for event in EVENTS:
            self.handlers[event] = [
                handler
                for handler in (getattr(p, f"on_{event}") for p in self.plugins)
                if getattr(handler, "__func__", None) is not getattr(Plugin, f"on_{event}")
            ]
        return True


def announced(event: str, method: Callable[..., None]) -> Callable[..., None]:
    """Let `trainer.log(...)` tell every plugin once, however often subclasses override it and call super()."""

    @wraps(method)
    def log(self: Base, records: dict[str, Any], dry_run: bool = False) -> None:
        dry_run = dry_run or bool(self.options.fast_dev_run)
        if event in self._announcing:  # a super().log(...) inside an override
            method(self, records, dry_run=dry_run)
            return
        self._announcing.add(event)
        try:
            method(self, records, dry_run=dry_run)
        finally:
            self._announcing.discard(event)
        self.emit(event, records, dry_run)

    log._announced = True  # type: ignore[attr-defined]
    return log

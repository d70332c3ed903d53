"""The window run again, for an optimizer that wants the gradient twice.

    pass 1    gradient at w, of the whole window                optimizer.perturb()     w → w + e
    pass 2    gradient at w + e, of the same micro-batches      optimizer.restore()     back to w, then the step

An optimizer asks for it by `passes = 2` and these two methods (`orbit.optim.SAM` does). The micro-batches of a window
are kept until it closes, each with the state of all random generators before its forward, so that dropout drops the
same units. Buffers move in the first pass only, and what a plugin or a user sees (loss, output, generators) is the
first pass's. A window that is dropped, or a forward that raises, leaves w as it was.

The loss has to be computed again, so the core must know how: `auto_update()`, `update(function)`,
`BaseTrainer.forward`. The function must find all it needs in the trainer: what lies in a variable of the loop's body is
that of the last micro-batch by then, which is an error here and not another gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from orbit.core import rng
from orbit.core.nested import first_tensor
from orbit.core.outcome import Outcome

if TYPE_CHECKING:
    from orbit.core.loop import Core


class SecondPassError(ValueError):
    """A loss that the optimizer needs twice cannot be computed again."""


def require_function(trainer: Core, outcome: Outcome) -> None:
    """SecondPassError for a loss that was computed by the user already."""
    if trainer.updater.passes > 1 and outcome.loss is not None:
        raise SecondPassError(
            f"{type(trainer.optimizer).__name__} takes the gradient twice, and this loss is a tensor, which cannot be "
            "computed again: give update() a function, update(lambda: loss_of(engine.batch)), or use auto_update()"
        )


class MicroBatch:
    """A micro-batch in the trainer's hands, before its forward: all that computing it again takes."""

    def __init__(self, trainer: Core, compute: Callable[[], Outcome]) -> None:
        self._compute = compute
        self._hands = {name: getattr(trainer, name) for name in trainer._bracketed}
        self._variables = {} if trainer.updater.accumulation == 1 else _variables(compute)
        self._rng = rng.capture()
        self._synchronised = trainer.updater.synchronised

    def run_again(self, trainer: Core) -> None:
        """Back-propagate it once more, at the parameters as they are now.

        Raises:
            SecondPassError: a tensor that the function reads is another one now.
        """
        now = _variables(self._compute) if self._variables else {}
        for name, value in now.items():
            if value is not self._variables.get(name, value):
                raise SecondPassError(
                    f"{type(trainer.optimizer).__name__} computes this loss again when its window is full, and the "
                    f"variable {name!r} that the function reads is the last micro-batch's by then: read engine.data, "
                    f"target or batch in it, or keep the value, update(lambda {name}={name}: ...)"
                )
        updater = trainer.updater
        exchanging, updater.synchronised = updater.synchronised, self._synchronised
        try:
            with trainer.bracketed(), trainer.exchange(self._synchronised), trainer.autocast():
                for name, value in self._hands.items():
                    setattr(trainer, name, value)
                rng.restore(self._rng)
                trainer.accumulate(self._compute)
        finally:
            updater.synchronised = exchanging


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables outside of a function, and of the functions beside it that it calls, that hold tensors."""
    found: dict[str, Any] = {}
    left: list[Any] = [function]
    seen = set[int]()
    while left:
        current = left.pop()
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        for name, value in _outer(current):
            if isinstance(value, FunctionType):
                beside = value.__globals__ is current.__globals__
                left += [value] if beside or name in current.__code__.co_freevars else []
            elif first_tensor(value) is not None:
                found[name] = value
    return found


def _outer(function: FunctionType) -> Iterator[tuple[str, Any]]:
    codes = [function.__code__]
    for code in codes:  # with the comprehensions and lambdas inside
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
    known = function.__globals__
    yield from ((name, known[name]) for code in codes for name in code.co_names if name in known)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell: the variable has no value yet
            yield name, cell.cell_contents

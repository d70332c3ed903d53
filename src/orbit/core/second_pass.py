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

import dis
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from orbit.core import rng
from orbit.core.base import Base
from orbit.core.events import Plugin
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
            SecondPassError: a tensor or a number that the function reads is another one now.
        """
        now = _variables(self._compute) if self._variables else {}
        for name, value in now.items():
            before = self._variables.get(name, value)
            if value is not before and not (isinstance(value, _PLAIN) and value == before):
                raise SecondPassError(
                    f"{type(trainer.optimizer).__name__} computes this loss again when its window is full, and the "
                    f"variable {name!r} that the function reads is the last micro-batch's by then: read engine.data, "
                    f"target or batch in it, or keep the value, update(lambda {name.rpartition('.')[2]}={name}: ...)"
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


_PLAIN = (int, float, str)


def _variables(function: Callable[..., Any]) -> dict[str, Any]:
    """What lies outside of a function, and of the functions beside it that it calls, and may be another micro-batch's:
    variables, and attributes of theirs, that hold tensors; and numbers and strings, which choose among batches. What
    the functions themselves write, a counter say, is not meant.
    """
    found: dict[str, Any] = {}
    written = set[str]()
    left: list[Any] = [function]
    seen = set[int]()
    while left:
        current = left.pop()
        if not isinstance(current, FunctionType) or id(current) in seen:
            continue
        seen.add(id(current))
        codes = _codes(current.__code__)
        read = {name for code in codes for name in code.co_names}
        written |= {name for code in codes for name in _stored(code)}
        for name, value in _outer(current, codes):
            if isinstance(value, FunctionType):
                beside = value.__globals__ is current.__globals__
                left += [value] if beside or name in current.__code__.co_freevars else []
            elif isinstance(value, _PLAIN) or first_tensor(value) is not None:
                found[name] = value
            elif hasattr(value, "__dict__") and not isinstance(value, _OWN_STATE):
                parts = vars(value)
                found |= {
                    f"{name}.{part}": parts[part]
                    for part in read & parts.keys()
                    if first_tensor(parts[part]) is not None
                }
    return {name: value for name, value in found.items() if name.rpartition(".")[2] not in written}


# A forward writes to a module, and the trainer's batch is put back; classes and modules are no variables.
_OWN_STATE = (nn.Module, Base, Plugin, Optimizer, type, ModuleType)


def _codes(code: CodeType) -> list[CodeType]:
    """With the comprehensions and lambdas inside."""
    codes = [code]
    for one in codes:
        codes += [part for part in one.co_consts if isinstance(part, CodeType)]
    return codes


@cache
def _stored(code: CodeType) -> frozenset[str]:
    """The variables and attributes outside of a function that it writes."""
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in _STORES)


_STORES = ("STORE_DEREF", "STORE_GLOBAL", "STORE_ATTR")


def _outer(function: FunctionType, codes: list[CodeType]) -> Iterator[tuple[str, Any]]:
    known = function.__globals__
    yield from ((name, known[name]) for code in codes for name in code.co_names if name in known)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # an empty cell: the variable has no value yet
            yield name, cell.cell_contents

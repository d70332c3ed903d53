"""Names of things that somebody may ask for by name: registered once each, and asked for with an error that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from orbit.core.names import did_you_mean

_T = TypeVar("_T")


class Names(Generic[_T]):
    """What is registered, by name.

    Args:
        kind: what it is, for messages.
        error: what is raised.

    >>> models = Names[type]("model", ValueError)
    >>> models.add("tiny", dict)
    >>> models["tinny"]
    Traceback (most recent call last):
    ...
    ValueError: model 'tinny' is not registered; registered: ['tiny']; did you mean 'tiny'?
    """

    def __init__(self, kind: str, error: type[Exception]) -> None:
        self._kind, self._error = kind, error
        self._things: dict[str, _T] = {}

    def add(self, name: str, thing: _T) -> None:
        """Register it; a module that is run again may register what it defines again.

        Raises:
            The error: the name is another's.
        """
        known = self._things.get(name, thing)
        if known is not thing and place_of(known) != place_of(thing):
            raise self._error(
                f"{name!r} is registered already, as {place_of(known)}; give this one another name"
            )
        self._things[name] = thing

    def get(self, name: str) -> _T | None:
        """What is registered under a name, or None."""
        return self._things.get(name)

    def __getitem__(self, name: str) -> _T:
        if name not in self._things:
            raise self._error(
                f"{self._kind} {name!r} is not registered; registered: {sorted(self)}{did_you_mean(name, self)}"
            )
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __contains__(self, name: object) -> bool:
        return name in self._things


def place_of(thing: Callable[..., Any] | Any) -> str:
    """Where a class or function is defined: `torch.nn.modules.linear.Linear`."""
    return f"{thing.__module__}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"

"""Components by name: what a config may name, and what a package of yours adds to it.

    DATASETS = Registry("dataset", {"QADataset": "orbit.data.qa:QADataset"})

    @DATASETS.register("MyData")              your own, by decorator
    class MyData(Dataset): ...

    DATASETS.add("MyData", MyData)            or by call
    DATASETS["MyData"]                        the class; an unknown name is an error with the nearest one

Built-in components are imported when somebody asks for them. An installed package offers its own by an entry point of
the group `orbit.<kind>`: `[project.entry-points."orbit.dataset"]  MyData = "my_package.data:MyData"`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from orbit.core.names import did_you_mean

_T = TypeVar("_T", bound=Callable[..., Any])


class UnknownComponentError(ValueError):
    """A name under which nothing is registered."""


class RegistrationError(ValueError):
    """A name that is taken, or that is none."""


class Registry(Mapping[str, Any]):
    """Components of one kind.

    Args:
        kind: what they are, in the singular; entry points are of the group `orbit.<kind>`.
        builtin: name → "module:attribute", imported when it is asked for.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self._builtin = dict(builtin or {})
        self._own: dict[str, Any] = {}

    def register(self, name: str | None = None) -> Callable[[_T], _T]:
        """A decorator: register a class or function under `name`, or under its own name.

        Raises:
            RegistrationError: as `add`.
        """

        def decorate(thing: _T) -> _T:
            self.add(name or thing.__name__, thing)
            return thing

        return decorate

    def add(self, name: str, thing: Any) -> None:
        """Register `thing` as `name`; a module that is run again may register again.

        Raises:
            RegistrationError: the name is empty, another component's, or `thing` cannot be called.
        """
        if not isinstance(name, str) or not name or name != name.strip():
            raise RegistrationError(f"{name!r} is no name for a {self.kind}")
        if not callable(thing):
            raise RegistrationError(
                f"{self.kind} {name!r} is a {type(thing).__name__}: register a class or function"
            )
        known = self._own.get(name, thing)
        if name in self._builtin or (known is not thing and _place(known) != _place(thing)):
            place = self._builtin.get(name) or _place(known)
            raise RegistrationError(
                f"a {self.kind} {name!r} is there already, {place}: give this one another name"
            )
        self._own[name] = thing

    def __getitem__(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        offered = self._offered()
        if name in offered:
            return offered[name].load()
        raise UnknownComponentError(
            f"there is no {self.kind} {name!r}{did_you_mean(str(name), self)}; there are: {', '.join(self)}"
        )

    def get(self, name: str, default: Any = None) -> Any:
        """The component, or `default`."""
        return self[name] if name in self else default

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._builtin or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._own, *self._builtin, *self._offered()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def describe(self, name: str) -> tuple[str, str]:
        """(the first line of its docstring, its arguments as one would write them).

        >>> Registry("text", {"wrap": "textwrap:fill"}).describe("wrap")
        ('Fill a single paragraph of text, returning a new string.', '(text, width=70, **kwargs)')
        """
        thing = self[name]
        line = (inspect.getdoc(thing) or "").split("\n", 1)[0]
        return line, str(inspect.signature(thing))

    def _offered(self) -> dict[str, EntryPoint]:
        """What installed packages offer."""
        return {point.name: point for point in entry_points(group=f"orbit.{self.kind}")}


def _place(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"

"""Objects from dicts: `type` says what, the rest are its arguments (document 003).

    {"type": "MyModel", "hidden_size": 128}            a registered class or function, called
    {"type": "torch.nn.Linear", "*": [64, 10]}         a dotted path; "*" are positional arguments
    {"type": "partial:torch.optim.AdamW", "lr": 3e-4}  functools.partial of it, instead of a call

A config may come from somewhere else, so a dotted path is imported only below an allow-list of packages: torch,
orbit, transformers, and the top-level packages of what is registered; `Registry.allow` extends it. What the path
leads to must be defined in an allowed package too (`torch.os.system` leads out of torch). Of torch and transformers it
may be a class, or a function of the modules for them (`torch.nn.functional`): among the other functions are some that
run commands. Register what you need besides.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from orbit.core.names import did_you_mean
from orbit.core.registry import Names, place_of

_T = TypeVar("_T", bound=Callable[..., Any])

_ALLOWED = frozenset({"torch", "orbit", "transformers"})
# Of torch and transformers: the modules whose functions may be called. Of all: what runs or unpickles what it is given.
_FUNCTIONS = (
    "torch",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.utils.data",
    "transformers.optimization",
)
_REFUSED = (
    "orbit.builder",
    "orbit.cli",
    "orbit.config",
    "torch.distributed.elastic",
    "torch.distributed.launcher",
    "torch.export",
    "torch.fx",
    "torch.jit",
    "torch.multiprocessing",
    "torch.package",
    "torch.testing",
    "torch.utils.cpp_extension",
    "torch.load",
    "torch.save",
    "torch.compile",
    "torch.classes",
    "torch.ops",
)


class BuildError(ValueError):
    """A config names nothing that may be built, or building it failed."""


class Registry:
    """Names of classes and functions that configs may build.

    Args:
        allow: more top-level packages whose dotted paths may be built.
    """

    def __init__(self, *, allow: tuple[str, ...] = ()) -> None:
        self._objects = Names[Callable[..., Any]]("type", BuildError)
        self._allowed = {*_ALLOWED, *allow}

    def register(self, name: str | None = None) -> Callable[[_T], _T]:
        """A decorator that registers a class or function, by its own name if none is given.

        Dotted paths of its top-level package may be built from then on.

        Raises:
            BuildError: the name is another object's, or contains ':' or '.'.
        """

        def add(thing: _T) -> _T:
            key = name or thing.__name__
            if ":" in key or "." in key:
                raise BuildError(f"{key!r} cannot be registered: dots and colons have a meaning in a type")
            self._objects.add(key, thing)
            if thing.__module__ != "__main__":
                self.allow(thing.__module__.split(".")[0])
            return thing

        return add

    def allow(self, *packages: str) -> None:
        """Let configs build what these packages define, by dotted paths."""
        self._allowed.update(packages)

    def get(self, name: str) -> Callable[..., Any] | None:
        """What is registered under a name, or None."""
        return self._objects.get(name)

    def resolve(self, name: str) -> Callable[..., Any]:
        """What a `type` means: a registered name, else a dotted path.

        Raises:
            BuildError: neither.
        """
        found = self._objects.get(name)
        if found is not None:
            return found
        if "." in name:
            return _imported(name, self._allowed)
        raise BuildError(
            f"type {name!r} is not registered, and no dotted path; registered: {sorted(self)}"
            f"{did_you_mean(name, self)}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._objects)

    def __contains__(self, name: object) -> bool:
        return name in self._objects


REGISTRY = Registry()
_NOTHING = Registry()


def build_from_cfg(
    cfg: Mapping[str, Any], registry: Registry | None = REGISTRY, recursive: bool = False, **extra: Any
) -> Any:
    """Build what a config describes.

    Args:
        cfg: with `type`, a name or the class itself; see the module for the rest. It is not changed.
        registry: where names are looked up; None: dotted paths alone.
        recursive: also build every dict with a `type` inside of it, also in lists and tuples, innermost first.
        extra: more keyword arguments, which go before those of the config and are passed as they are.

    Raises:
        BuildError: naming the place in the config and what is wrong there. What the object's own constructor raises
            is passed on, with a note that says where in the config.
    """
    return _build(cfg, registry or _NOTHING, recursive, extra, "config")


def _build(cfg: Any, registry: Registry, recursive: bool, extra: Mapping[str, Any], where: str) -> Any:
    if not isinstance(cfg, Mapping):
        raise BuildError(f"{where} is a {type(cfg).__name__}; what is built is a dict with a 'type'")
    if "type" not in cfg:
        raise BuildError(f"{where} has no 'type'; it has {sorted(map(str, cfg))}")
    arguments = {key: value for key, value in cfg.items() if key not in ("type", "*")}
    positional = cfg.get("*", ())
    if not isinstance(positional, (list, tuple)):
        raise BuildError(f"{where}['*'] holds positional arguments and must be a list, not {positional!r}")
    if recursive:
        arguments = {key: _inside(value, registry, f"{where}.{key}") for key, value in arguments.items()}
        positional = [_inside(value, registry, f"{where}['*'][{k}]") for k, value in enumerate(positional)]
    names = [key for key in arguments if not isinstance(key, str)]
    if names:
        raise BuildError(f"{where} has the key {names[0]!r}, which is no name of an argument")
    called, partial = _called(cfg["type"], registry, where)
    arguments |= extra
    if partial:
        return functools.partial(called, *positional, **arguments)
    try:
        return called(*positional, **arguments)
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"while building {where}, a {cfg['type']!r}")
        raise


def _inside(value: Any, registry: Registry, where: str) -> Any:
    """A value with every config inside of it built."""
    if isinstance(value, Mapping):
        if "type" in value:
            return _build(value, registry, True, {}, where)
        return {key: _inside(one, registry, f"{where}.{key}") for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_inside(one, registry, f"{where}[{k}]") for k, one in enumerate(value))
    return value


def _called(kind: Any, registry: Registry, where: str) -> tuple[Callable[..., Any], bool]:
    if isinstance(kind, str):
        name = kind.removeprefix("partial:")
        try:
            return registry.resolve(name), name != kind
        except BuildError as error:
            raise BuildError(f"{where}: {error}") from None
    if callable(kind):
        return kind, False
    raise BuildError(
        f"{where}: its type is {kind!r}, and must be a name, a dotted path, a class or a function"
    )


def _imported(path: str, allowed: set[str]) -> Callable[..., Any]:
    """What a dotted path leads to.

    Raises:
        BuildError: it leads nowhere, to something that is not called, or out of the allowed packages.
    """
    parts = path.split(".")
    if parts[0] not in allowed:
        raise BuildError(
            f"type {path!r}: only {sorted(allowed)} may be imported by a config; register it, or "
            f"REGISTRY.allow({parts[0]!r})"
        )
    if not all(part.isidentifier() and not part.startswith("_") for part in parts):
        raise BuildError(f"type {path!r} is no dotted path of public names")
    found: Any = importlib.import_module(parts[0])
    for depth, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = _submodule(".".join(parts[:depth]), path)
        home = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)
        if not isinstance(home, str) or home.split(".")[0] not in allowed:
            raise BuildError(
                f"type {path!r} leads out of {sorted(allowed)}, to {found!r}; register it instead"
            )
    if isinstance(found, ModuleType) or not callable(found):
        raise BuildError(f"type {path!r} is a {type(found).__name__}, which cannot be called")
    if any(
        (name + ".").startswith(f"{refused}.") for refused in _REFUSED for name in (path, place_of(found))
    ):
        raise BuildError(
            f"type {path!r} runs what it is given, so a config may not name it; register what you need"
        )
    if parts[0] in ("torch", "transformers") and not _may_call(path, found):
        raise BuildError(
            f"type {path!r}: of {parts[0]}, a config may name classes and the functions of {', '.join(_FUNCTIONS)}; "
            "register what you need besides"
        )
    return found


def _submodule(name: str, path: str) -> ModuleType:
    parent, _, _ = name.rpartition(".")
    if not hasattr(sys.modules.get(parent), "__path__"):
        raise BuildError(f"type {path!r}: there is no {name!r}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise BuildError(f"type {path!r}: there is no {name!r}") from None


def _may_call(path: str, found: Any) -> bool:
    """May a config call this, of torch or transformers?"""
    if isinstance(found, type):
        return True
    owner = getattr(found, "__self__", None)  # a classmethod: AutoModel.from_pretrained
    return isinstance(owner, type) or not {path.rpartition(".")[0], found.__module__}.isdisjoint(_FUNCTIONS)

"""Names of layers and parameters, and the grammar in which users mean them.

    "q_proj", "mlp.up_proj"      a dotted suffix of the name
    "layers.*.q_proj"            a glob, of the whole name or of a dotted suffix; * goes across dots
    "re:.*[qv]_proj"             a regular expression for the whole name

Nothing is found by substring.

A pattern such as `(a|a)*` can take time exponential in the name's length, and a config that arrives with an adapter
may hold one. `re` cannot be interrupted; `regex`, which reads the same grammar, can.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import regex

from orbit.core.names import nearest

BUDGET = 1.0  # seconds for all the matches of one pattern; thousands of names take milliseconds


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """A layer's name without the segments that torch.compile and checkpoint wrappers put in.

    >>> clean("layers.0._orig_mod.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def matches(target: str, names: Iterable[str], error: type[ValueError] = ValueError) -> list[str]:
    """The names that `target` matches by the module's grammar, as they are or without wrappers (`clean`).

    Raises:
        error: `target` is no regular expression, or one that takes too long.

    >>> matches("q_proj", ["a.q_proj", "a.eq_proj", "q_proj.x"])
    ['a.q_proj']
    """
    if target.startswith("re:"):
        is_meant = Pattern(target[3:], "targets", error).fullmatch
    elif is_pattern(target):
        is_meant = lambda name: fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")  # noqa: E731
    else:
        is_meant = lambda name: name == target or name.endswith(f".{target}")  # noqa: E731
    return [name for name in names if is_meant(clean(name)) or (name != clean(name) and is_meant(name))]


def is_pattern(target: str) -> bool:
    """A glob or a regular expression, rather than a name."""
    return target.startswith("re:") or any(mark in target for mark in "*?[")


def at_or_below(name: str, roots: Collection[str]) -> bool:
    """Is `name` one of the roots, or the name of something in one? The root of all is "".

    >>> at_or_below("a.b.c", {"a.b"}), at_or_below("a.bc", {"a.b"}), at_or_below("a", {""})
    (True, False, True)
    """
    while name and name not in roots:
        name = name.rpartition(".")[0]
    return name in roots


def nearest_ending(target: str, names: Iterable[str]) -> str | None:
    """The name, or end of a name, most like a target that matched none of them; None if none is near.

    >>> nearest_ending("q_porj", ["layers.0.q_proj", "layers.0.k_proj"])
    'q_proj'
    """
    wanted = target.removeprefix("re:")
    segments = [name.split(".") for name in names if name]
    endings = {".".join(parts[start:]) for parts in segments for start in range(len(parts))}
    return nearest(wanted, (e for e in endings if e.count(".") <= wanted.count(".") and not e.isdigit()))


class Pattern:
    """A compiled expression.

    Args:
        text: the expression.
        label: what the setting is called in errors.
        error: their type.

    Raises:
        error: it is no regular expression.

    >>> Pattern("(a|a)*", "targets").fullmatch("a" * 60 + "b")
    Traceback (most recent call last):
        ...
    ValueError: targets: matching '(a|a)*' takes over 1 s; write it without nested repeats
    """

    def __init__(self, text: str, label: str, error: type[ValueError] = ValueError) -> None:
        self._text, self._label, self._error, self._left = text, label, error, BUDGET
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError) as problem:
            raise error(f"{label}: {text!r} is not a regular expression: {problem}") from None

    def fullmatch(self, name: str) -> bool:
        """Does the expression match the whole name?

        Raises:
            error: the matches of this pattern took too long.
        """
        start = time.monotonic()
        try:
            found = self._compiled.fullmatch(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise self._error(
                f"{self._label}: matching {self._text!r} takes over {BUDGET:g} s; write it without nested repeats"
            ) from None
        took = time.monotonic() - start
        self._left -= took if took > 1e-3 else 0.0  # an honest match takes microseconds
        return found

"""Regular expressions that users and files bring, matched within a time limit.

A pattern such as `(a|a)*` can take time exponential in the name's length, and a config that arrives with an adapter
may hold one. `re` cannot be interrupted; `regex`, which reads the same grammar, can.
"""

from __future__ import annotations

import time

import regex

from orbit.adapter.errors import AdapterError, ConfigError

BUDGET = 1.0  # seconds for all the matches of one pattern; thousands of names take milliseconds


_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """A layer's name without the segments that torch.compile and checkpoint wrappers put in.

    >>> clean("layers.0._orig_mod.q_proj")
    'layers.0.q_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


class Pattern:
    """A compiled expression.

    Args:
        text: the expression.
        label: what the setting is called in errors.
        error: their type.

    Raises:
        ConfigError: it is no regular expression.

    >>> Pattern("(a|a)*", "targets").fullmatch("a" * 60 + "b")
    Traceback (most recent call last):
        ...
    orbit.adapter.errors.ConfigError: targets: matching '(a|a)*' takes over 1 s; write it without nested repeats
    """

    def __init__(self, text: str, label: str, error: type[AdapterError] = ConfigError) -> None:
        self._text, self._label, self._error, self._left = text, label, error, BUDGET
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError) as problem:
            raise error(f"{label}: {text!r} is not a regular expression: {problem}") from None

    def fullmatch(self, name: str) -> bool:
        """Does the expression match the whole name?

        Raises:
            ConfigError: the matches of this pattern took too long.
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

"""The name that somebody probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(wanted: str, names: Iterable[str]) -> str | None:
    """The name most like `wanted`, or None if none is near.

    >>> nearest("q_porj", ["q_proj", "k_proj"]), nearest("head", ["q_proj"])
    ('q_proj', None)
    """
    close = difflib.get_close_matches(wanted, sorted(set(names)), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(wanted: str, names: Iterable[str]) -> str:
    """What an error about an unknown name ends with: nothing, if no name is near.

    >>> did_you_mean("hoks", ["hooks", "lr"]), did_you_mean("x", ["hooks"])
    ("; did you mean 'hooks'?", '')
    """
    close = nearest(wanted, names)
    return "" if close is None else f"; did you mean {close!r}?"

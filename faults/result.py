"""What a case found, as a line of the table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One line.

    Attributes:
        case: the case's name.
        done: what was done to the run.
        figure: what came of it, in numbers.
        holds: whether that is what must be. The line says what failed in `figure`.
    """

    case: str
    done: str
    figure: str
    holds: bool


HEAD = ("case", "what was done", "figure", "holds")


def table(results: Iterable[Result]) -> str:
    """Markdown that also reads well on a terminal.

    >>> print(table([Result("kill_in_save", "100 kills", "100/100 loadable", True)]))
    | case         | what was done | figure           | holds |
    | ------------ | ------------- | ---------------- | ----- |
    | kill_in_save | 100 kills     | 100/100 loadable | yes   |
    """
    lines = [
        HEAD,
        *((r.case, *map(_cell, (r.done, r.figure)), "yes" if r.holds else "NO") for r in results),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())

"""Answers of several voices, side by side on a terminal and one below the other elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_answers(answers: Mapping[str, str], out: TextIO) -> None:
    """Write each name and its answer.

    >>> import sys
    >>> show_answers({"math": "4", "off": "Four."}, sys.stdout)
    [math]
    4
    [off]
    Four.
    """
    if not out.isatty():
        for name, answer in answers.items():
            out.write(f"[{name}]\n{answer}\n")
        return
    table = Table(expand=True)
    for name in answers:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))  # as text, in which brackets are no markup
    Console(file=out).print(table)

"""Messages as somebody types them, over one line or several.

first line \\            a line that ends in a backslash goes on in the next
and the second

\"\"\"
def f(x):               everything between two lines' triple quotes is one message, also what begins with "/"
    return x
\"\"\"
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

QUOTES = '"""'


@dataclass(frozen=True)
class Typed:
    """What was typed.

    Attributes:
        text: without white space at its ends.
        is_command: does it begin with "/", outside of quotes?
    """

    text: str
    is_command: bool


def from_terminal() -> Callable[[str], str]:
    """Asks for a line with a prompt. With readline, where Python has it, lines are edited and come back by arrow keys.

    Raises, when called: EOFError at the end of input, KeyboardInterrupt at Ctrl-C.
    """
    if importlib.util.find_spec("readline") is not None:
        import readline  # noqa: F401 (`input` uses it from now on)
    return lambda prompt: input(prompt)


def from_lines(lines: Iterable[str]) -> Callable[[str], str]:
    """Takes the next of these lines in place of a typist's."""
    left = iter(lines)

    def ask(prompt: str) -> str:
        for line in left:
            return line.rstrip("\r\n")
        raise EOFError

    return ask


def read_message(ask: Callable[[str], str]) -> Typed:
    """The next message.

    Raises:
        EOFError: there is none, or it breaks off. KeyboardInterrupt: from `ask`.
    """
    line = ask("> ").strip()
    if line.startswith(QUOTES):
        return Typed(_quoted(line.removeprefix(QUOTES), ask), is_command=False)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(ask("... ").rstrip())
    text = "\n".join(lines).strip()
    return Typed(text, is_command=text.startswith("/"))


def _quoted(line: str, ask: Callable[[str], str]) -> str:
    """Everything up to the line that ends in quotes."""
    lines = [line]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(ask("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n").rstrip()

"""A conversation that somebody types: messages and commands in, replies out, until `/quit` or the end of input.

Nothing that is typed ends in a traceback: what the chat refuses is answered with the reason. Ctrl-C stops a reply, and
at the prompt drops the line; a second one there leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from orbit.adapter import AdapterError
from orbit.chat.commands import run_command
from orbit.chat.errors import ChatError
from orbit.chat.reading import Typed, read_message
from orbit.model.errors import ShapeError

if TYPE_CHECKING:
    from orbit.chat.interface import ChatInterface


class Session:
    """A chat at a terminal.

    Args:
        chat: the conversation.
        ask: gives the next line (`reading.py`).
        out: where replies go.

    Attributes:
        is_over: has somebody asked to leave?
    """

    def __init__(self, chat: ChatInterface, ask: Callable[[str], str], out: TextIO) -> None:
        self.chat = chat
        self.out = out
        self.is_over = False
        self._ask = ask

    def run(self) -> None:
        """Until somebody leaves. What the model raises is passed on."""
        self.say("/help lists what can be typed besides messages, /quit leaves\n")
        interrupted = False
        while not self.is_over:
            try:
                typed = read_message(self._ask)
            except EOFError:
                self.say("\n")
                return
            except KeyboardInterrupt:
                self.say("\n")
                if interrupted:
                    return
                self.note("Ctrl-C again, Ctrl-D or /quit leaves")
                interrupted = True
                continue
            except UnicodeError as error:
                self.note(f"that is no text: {error}")
                continue
            interrupted = False
            self._obey(typed)

    def say(self, text: str) -> None:
        """Write at once."""
        self.out.write(text)
        self.out.flush()

    def note(self, text: str) -> None:
        """Say something that is no reply."""
        self.say(f"({text})\n")

    def _obey(self, typed: Typed) -> None:
        try:
            if typed.is_command:
                run_command(self, typed.text)
            elif typed.text:
                self.chat.respond(typed.text, on_text=self.say)
                self.say("\n")
        except KeyboardInterrupt:
            self.say("\n")
            self.note("stopped; the conversation is as it was before")
        except (
            ChatError,
            AdapterError,
            ShapeError,
            OSError,
        ) as error:  # a ShapeError: too long for the model
            self.note(str(error))

"""What can be typed besides messages: one line of `COMMANDS` each, which is also the help."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orbit.chat.comparing import show_answers
from orbit.chat.errors import ChatError
from orbit.chat.voices import voice_name
from orbit.core.names import did_you_mean

if TYPE_CHECKING:
    from orbit.chat.terminal import Session


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: what is typed first.
        takes: what follows it; in brackets, what may be left out.
        does: for the help.
        run: does it, with what follows the name.
    """

    name: str
    takes: str
    does: str
    run: Callable[[Session, str], None]

    def __str__(self) -> str:
        return f"{self.name} {self.takes}".rstrip()


def run_command(session: Session, line: str) -> None:
    """Obey a line that begins with "/".

    Raises:
        ChatError: it is no command, or lacks something. What the command raises.
    """
    name, _, given = line.partition(" ")
    known = {command.name: command for command in COMMANDS}
    if name not in known:
        raise ChatError(f"{line!r} is no command{did_you_mean(name, known)}: /help lists them")
    command, given = known[name], given.strip()
    needed = re.sub(r"\[.*?\]", "", command.takes).split()
    if (given and not command.takes) or len(_words(given)) < len(needed):
        raise ChatError(f"{line!r}: write it as {command}")
    command.run(session, given)


def _words(text: str) -> list[str]:
    """The words of a line; those in quotes may have spaces."""
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', text)]


def _help(session: Session, given: str) -> None:
    width = max(len(str(command)) for command in COMMANDS)
    session.say("".join(f"{command!s:{width}}  {command.does}\n" for command in COMMANDS))
    session.say('A line that ends in \\ goes on in the next; """ begins and ends a message of many lines.\n')


def _reset(session: Session, given: str) -> None:
    session.chat.reset()
    session.note("the conversation is forgotten")


def _undo(session: Session, given: str) -> None:
    session.chat.undo()
    session.note(f"the last turn is forgotten; {_count(session)}")


def _retry(session: Session, given: str) -> None:
    session.chat.retry(on_text=session.say)
    session.say("\n")


def _system(session: Session, given: str) -> None:
    if given:
        session.chat.set_system(None if given == "off" else given)
    session.note("no system message" if (now := session.chat.system) is None else f"system message: {now}")


def _adapter(session: Session, given: str) -> None:
    if given:
        session.chat.use_adapter(given)
    now, others = session.chat.adapter, session.chat.adapters()
    have = f"; there are {', '.join(others)}" if others and not given else ""
    session.note(f"answering with {'the base model' if now is None else voice_name(now)}{have}")


def _compare(session: Session, given: str) -> None:
    one, other = _words(given)[:2]
    match = re.match(r'(?:"[^"]*"|\S+)\s+(?:"[^"]*"|\S+)\s*', given)
    question = "" if match is None else given[match.end() :]
    show_answers(session.chat.compare((one, other), question or None), session.out)


def _set(session: Session, given: str) -> None:
    name, _, value = given.partition(" ")
    session.chat.settings = session.chat.settings.changed(name, value.strip())
    _settings(session, "")


def _settings(session: Session, given: str) -> None:
    session.say(f"{session.chat.settings}\n")


def _save(session: Session, given: str) -> None:
    session.chat.save(Path(given))
    session.note(f"saved to {given}")


def _load(session: Session, given: str) -> None:
    session.chat.load(Path(given))
    session.note(f"loaded; {_count(session)}")


def _quit(session: Session, given: str) -> None:
    session.is_over = True


def _count(session: Session) -> str:
    return f"the conversation has {len(session.chat.messages)} messages"


COMMANDS = (
    Command("/help", "", "lists these", _help),
    Command("/reset", "", "forgets the conversation", _reset),
    Command("/undo", "", "forgets the last turn", _undo),
    Command("/retry", "", "answers the last message again", _retry),
    Command("/system", "[TEXT|off]", "shows or sets the system message", _system),
    Command(
        "/adapter", "[NAME|FOLDER|off]", "shows or switches who answers; off is the base model", _adapter
    ),
    Command("/compare", "A B [QUESTION]", "two adapters' answers, by default to the last message", _compare),
    Command("/settings", "", "shows how replies are drawn", _settings),
    Command("/set", "NAME VALUE", "changes that, for instance /set temperature 0.7", _set),
    Command("/save", "FILE", "writes the conversation to a JSON file", _save),
    Command("/load", "FILE", "goes on with a conversation from a file", _load),
    Command("/quit", "", "leaves, as Ctrl-D does; Ctrl-C stops a reply", _quit),
)

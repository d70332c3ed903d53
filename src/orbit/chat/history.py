"""Conversations as files: {"messages": [{"role": …, "content": …}, …]} in JSON, which fine-tuning data uses too.

A file holds whole turns: a system message or none, then user and assistant by turns. What is read is checked, since the
file may come from elsewhere; a bare list of messages is read as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orbit.chat.errors import ChatError
from orbit.core.files import replace_synced

_LARGEST = 64 << 20  # bytes


def write_messages(path: str | Path, messages: Sequence[Mapping[str, str]]) -> None:
    """Write a conversation: all of it or, if anything fails, what the file held before.

    Raises:
        OSError: from the file system.
    """
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=1)
    replace_synced(Path(path).expanduser(), f"{text}\n".encode())


def read_messages(path: str | Path) -> list[dict[str, str]]:
    """The conversation in a file.

    Raises:
        ChatError: the file holds none, or one that breaks off. OSError: from the file system.
    """
    path = Path(path).expanduser()
    if path.stat().st_size > _LARGEST:
        raise ChatError(f"{path} has {path.stat().st_size:,} bytes, which is no conversation")
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{path} is no conversation: it is not JSON ({error})") from None
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list):
        raise ChatError(
            f'{path} is no conversation: it needs {{"messages": [{{"role": …, "content": …}}, …]}}'
        )
    return [_checked(path, number, message, messages) for number, message in enumerate(messages)]


def is_text(value: Any) -> bool:
    """Is this text that can be written? Bytes that a terminal could not decode, and half a pair of JSON's, are not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(path: Path, number: int, message: Any, messages: list[Any]) -> dict[str, str]:
    """Message `number`, if it is one and its turn."""
    if (
        not isinstance(message, dict)
        or message.keys() != {"role", "content"}
        or not all(is_text(value) for value in message.values())
    ):
        raise ChatError(f'{path}: message {number} must be {{"role": …, "content": …}} of text')
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    turn = number - has_system
    wanted = "system" if turn < 0 else ("user", "assistant")[turn % 2]
    if message["role"] != wanted:
        raise ChatError(
            f"{path}: message {number} is of {message['role']!r}, and must be of {wanted!r}: one of system or none, "
            "then user and assistant by turns"
        )
    if number == len(messages) - 1 and wanted == "user":
        raise ChatError(
            f"{path}: message {number}, the last, has no answer: drop it, or add one of assistant"
        )
    return dict(message)

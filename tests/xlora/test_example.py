"""examples/03_mixture.py on a tiny model and few texts, and the texts that it trains on."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from orbit.xlora import from_pretrained
from tests.tiny_llm import tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = ("facts", "chat", "verse")
TEXTS = {
    "facts": "what is the capital of mali ? bamako",
    "chat": "hello user hello assistant : hello hello",
    "verse": "march march ghana when did the system become march",
}


def lines(kind: str) -> list[dict[str, str]]:
    return [
        json.loads(line) for line in (EXAMPLES / "data" / f"{kind}.jsonl").read_text("utf-8").splitlines()
    ]


def test_what_is_held_out_shares_no_country_topic_or_chapter_with_training() -> None:
    group = {
        "facts": lambda source: source.split(" ")[0],
        "chat": str,
        "verse": lambda source: source.rpartition(":")[0],
    }
    for kind in KINDS:
        groups: dict[str, set[str]] = {"train": set(), "held out": set()}
        found = lines(kind)
        for line in found:
            groups[line["split"]].add(group[kind](line["source"]))
        assert not groups["train"] & groups["held out"]
        assert sum(line["split"] == "held out" for line in found) >= 200
        assert len({line["text"].lower() for line in found}) == len(found)
        asks = [line["text"].count("\n") for line in found]
        assert set(asks) == ({0} if kind == "verse" else {1})
    assert sum((EXAMPLES / "data" / f"{kind}.jsonl").stat().st_size for kind in KINDS) < 400_000


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for kind, text in TEXTS.items():
        words = text.split()
        some = [
            {
                "text": " ".join(words[k % 3 :] + words[: k % 3]),
                "split": "train" if k < 40 else "held out",
                "source": "",
            }
            for k in range(45)
        ]
        (tmp_path / "data" / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, some)))
    shutil.copy(EXAMPLES / "03_mixture.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["03_mixture.py", str(tmp_path / "model")])
    threads = torch.get_num_threads()
    ran = runpy.run_path(str(tmp_path / "03_mixture.py"), run_name="__main__")
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = {
        found[1].strip(): [float(x) for x in found[2].split()]
        for found in re.finditer(r"^(base|\w+ alone|router) +((?: *[\d.]+){4})$", printed, re.MULTILINE)
    }
    assert list(rows) == ["base", "facts alone", "chat alone", "verse alone", "router"]
    for *kinds, mean in rows.values():
        assert mean == pytest.approx(sum(kinds) / 3, abs=0.02)
    for k, kind in enumerate(KINDS):
        assert rows[f"{kind} alone"][k] == min(row[k] for name, row in rows.items() if name != "router")
    accuracy = re.search(r"^router accuracy((?: +[\d.]+%){4})$", printed, re.MULTILINE)
    assert accuracy is not None
    assert "15 texts held out" in printed
    assert (tmp_path / "runs/mixture/heatmap.png").stat().st_size > 5000
    assert (tmp_path / "runs/mixture/heatmap.html").is_file()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=ran["dtype"])
    again = from_pretrained(tmp_path / "runs/mixture", base, list(KINDS))
    ids = torch.arange(6)[None]
    mine = ran["model"]
    assert torch.equal(again(ids).logits, mine(ids).logits)

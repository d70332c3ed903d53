"""docs/runs.md does what it shows, on a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orbit import cli
from tests.tiny_llm import tiny_llama, tiny_tokenizer

PAGE = (Path(__file__).parents[1] / "docs" / "runs.md").read_text("utf-8")
MODEL = "model.model_args.pretrained_model_name_or_path=model"
SMALL = {"train": [MODEL, "trainer.args.max_steps=1"], "eval": [MODEL]}


def test_the_page_does_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORBIT_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("model")
    tiny_llama(tokenizer).save_pretrained("model")
    printed = []
    for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            _, *words = shlex.split(line)
            assert cli.main([*words, *SMALL.get(words[0], [])]) == 0, line
            printed.append(capsys.readouterr().out)
    assert "is done" not in printed[0]
    assert "is done" in printed[1]
    assert "learning_rate: 0.0001" in printed[2]
    assert "exact_match" in printed[3]
    assert "holds the merged model" in printed[4]
    named = set(re.findall(r"^\| `(\w+)[./` <]", PAGE, re.MULTILINE))
    written = {path.name.split(".")[0] for path in Path("runs/sft/first").iterdir()}
    assert named == written
    assert len(list(Path("runs/sft").iterdir())) == 3

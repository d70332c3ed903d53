"""`orbit list` shows what a config can name, what others offer and what the user registers too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orbit import cli
from orbit.pipeline import REGISTRIES
from orbit.pipeline.listing import described


def test_every_component_is_listed_with_its_sentence_and_arguments() -> None:
    for kind in REGISTRIES:
        for component in described(kind):
            assert component["name"] in REGISTRIES[kind]
            assert component["is"], f"{kind}: {component['name']} has no docstring"
            assert component["arguments"].startswith("(")
    [qa] = [one for one in described("datasets") if one["name"] == "QADataset"]
    assert "question_key='question'" in qa["arguments"]


def test_the_tables_and_their_json(capsys) -> None:
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(kind in shown for kind in REGISTRIES)
    assert "QADataset" in shown
    assert cli.main(["list", "trainers", "--json"]) == 0
    [(kind, found)] = json.loads(capsys.readouterr().out).items()
    assert kind == "trainers"
    assert "finetune" in {one["name"] for one in found}


def test_what_others_offer_is_listed_even_if_it_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "their_suites-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-suites\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[orbit.suite]\ngone = not_there:gone\nabc = string:Formatter\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    abc, gone = (one for one in described("suites") if one["name"] in ("abc", "gone"))
    assert abc["arguments"].startswith("(")
    assert "'gone' of their-suites cannot be imported" in gone["is"]


def test_a_kind_that_there_is_not(capsys) -> None:
    assert cli.main(["list", "dataset"]) == 1
    assert "did you mean 'datasets'?" in capsys.readouterr().err

"""The example of a language model, at tiny scale, with and without experts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/05_language_model.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("language_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROWS", 4)
    return module


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns_and_writes(
    example: ModuleType, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = example.main([], steps=32, width=16, optimizer=optimizer)
    printed = capsys.readouterr().out
    assert loss < 4.5 < 5.5, "log 256 is 5.5"
    assert printed.count("held out") == 8
    assert "And the " in printed
    assert ("21 parameters with Muon, 9 with AdamW" in printed) == (optimizer == "muon")


def test_experts_are_muons_too(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 100, "utf-8")
    assert example.main([tmp_path / "text.txt"], steps=16, width=16, moe=True) < 5.0
    assert "18 parameters with Muon, 12 with AdamW" in capsys.readouterr().out


def test_a_text_that_is_too_short_says_so(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat", "utf-8")
    with pytest.raises(ValueError, match="7 bytes are too few .*1280 at least"):
        example.main([tmp_path / "text.txt"])

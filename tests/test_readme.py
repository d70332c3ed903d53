"""The README's programs run, in order, in one namespace, and print what stands below them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_llm import tiny_llama, tiny_tokenizer

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_programs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(extra=("When", "Ghana", "March", "independent?"))
    tiny_llama(tokenizer).save_pretrained(tmp_path / "path/to/model")
    tokenizer.save_pretrained(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    shown = 0
    namespace: dict[str, Any] = {"__name__": "readme"}
    for index, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        exec(compile(code, f"<README block {index}>", "exec"), namespace)
        printed = capsys.readouterr().out
        following = blocks[index + 1] if index + 1 < len(blocks) else ("", "")
        if following[0] == "" and following[1]:
            assert words(printed) == words(following[1])
            shown += 1
            assert numbers(printed) == pytest.approx(numbers(following[1]), rel=0.1)
    assert (tmp_path / "adapters/facts/adapter_model.safetensors").exists()
    assert shown == 2
    assert (tmp_path / "mixture/xlora_classifier.safetensors").exists()
    assert (tmp_path / "scalings.html").exists()
    assert (tmp_path / "runs/linear/checkpoints/checkpoint_step_100.pt").exists()


def words(text: str) -> str:
    return " ".join(re.sub(r"\d+\.\d+", "#", text).split())


def numbers(text: str) -> list[float]:
    """All decimals but durations; they may differ a little between processors."""
    return [float(number) for number in re.findall(r"\d+\.\d+(?! s\))", re.sub(r"\(.*? s\)", "", text))]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)

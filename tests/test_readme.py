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


# ── the list of features ──────────────────────────────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "tests" / "documents" / "000_features.md").read_text().partition("## Features")[2]
SECTION = README.partition("## Features")[2].partition("\n## ")[0]
ITEMS = re.findall(r"^- \[([x ])\] (.*)", SECTION, re.MULTILINE)


def names_in(text: str) -> set[str]:
    """What stands in backticks, by its first word, without paths such as `orbit.model`."""
    return {
        name for name in re.findall(r"`(\w[\w.]*)[^`]*`", text) if not name.startswith(("orbit.", "tests/"))
    }


def titles_in(text: str) -> set[str]:
    return {re.sub(r"\W+$", "", title) for title in re.findall(r"\*\*(.+?)\*\*", text)}


def why_no_tick(item: str) -> list[str]:
    """What an entry of the list lacks to be ticked."""
    links = re.findall(r"\]\((\S+?)\)", item)
    found = {link: (ROOT / link).read_text() if (ROOT / link).is_file() else "" for link in links}
    sources = "\n".join(text for link, text in found.items() if link.startswith("src/orbit/"))
    tests = "\n".join(text for link, text in found.items() if re.fullmatch(r"tests/.*/test_\w+\.py", link))
    lacks = [f"{link} is not there" for link, text in found.items() if not text]
    lacks += [] if re.search(r"^def test_", tests, re.MULTILINE) else ["no test"]
    for name in names_in(item):
        lacks += [] if re.search(rf"\b{name}", sources) else [f"{name} is not in the linked source"]
        lacks += [] if re.search(rf"\b{name}", tests) else [f"{name} is not in the linked tests"]
    return lacks


def test_the_list_of_features_is_that_of_document_000() -> None:
    listed = [item for _, item in ITEMS]
    assert len(ITEMS) == SECTION.count("\n- ") > 25
    missing = names_in(DOCUMENT) - names_in("\n".join(listed))
    assert missing == set()
    assert titles_in(DOCUMENT) - titles_in("\n".join(listed)) == set()


@pytest.mark.parametrize(("mark", "item"), ITEMS, ids=lambda part: part.partition(":")[0][:24])
def test_a_feature_is_ticked_by_its_tests_alone(mark: str, item: str) -> None:
    assert (mark, why_no_tick(item)) == ("x", [])


def test_a_tick_without_a_test_is_seen() -> None:
    item = "`freeze_layers`: [freeze.py](src/orbit/model/freeze.py); [test_freeze.py](tests/model/test_freeze.py)"
    assert why_no_tick(item) == []
    assert why_no_tick(item.replace("test_freeze.py)", "test_gone.py)")) == [
        "tests/model/test_gone.py is not there", "no test", "freeze_layers is not in the linked tests",
    ]  # fmt: skip
    assert why_no_tick(item.replace("`freeze_layers`", "`melt_layers`")) == [
        "melt_layers is not in the linked source", "melt_layers is not in the linked tests",
    ]  # fmt: skip
    assert why_no_tick(item.partition(";")[0]) == ["no test", "freeze_layers is not in the linked tests"]

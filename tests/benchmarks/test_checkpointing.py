"""The benchmark of saving runs and says what it measured; the figures themselves are `make bench-checkpoints`'s."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import checkpointing


def test_every_round_measures_both_saves_and_a_step_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "WIDTH", 64)
    seconds = checkpointing.measure(layers=2, rounds=3, device="cpu", folder=tmp_path)
    assert {name: len(values) for name, values in seconds.items()} == {
        "synchronous": 3,
        "asynchronous": 3,
        "step": 3,
        "step beside": 3,
    }
    assert all(value > 0 for values in seconds.values() for value in values)
    assert {path.name for path in tmp_path.iterdir()} == {"synchronous", "asynchronous"}


def test_the_report_takes_ratios_within_rounds() -> None:
    seconds = {
        "synchronous": [1.0, 10.0, 1.0],
        "asynchronous": [0.05, 0.5, 0.2],
        "step": [0.1, 0.1, 0.1],
        "step beside": [0.2, 0.1, 0.3],
    }
    text = checkpointing.report(seconds, 1.21)
    assert "stall over the synchronous one's: 0.050, bar 0.10: kept" in text
    assert "a step beside the write over one without: 2.00" in text
    assert "1.21 GB" in text

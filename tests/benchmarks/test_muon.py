"""The benchmark of Muon runs and says what it measured; the figures themselves are `make bench-muon`'s."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import muon
from orbit.model import Transformer, TransformerConfig


def test_it_writes_both_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        muon,
        "decoder",
        lambda: Transformer(TransformerConfig(256, hidden_size=16, num_layers=1, num_heads=2)),
    )
    monkeypatch.setattr(muon, "ROWS", 2)
    monkeypatch.setattr(muon, "EVALUATIONS", 10)
    muon.main(["--steps", "20", "--seeds", "2", "--rates", "1", "--out", str(tmp_path / "muon.md")])
    text = (tmp_path / "muon.md").read_text("utf-8")
    assert "AdamW, best lr 0.002" in text
    assert "Muon, best lr 0.005" in text
    assert "a AdamW, o Muon" in text
    assert "part of AdamW's 20 steps" in text


def test_where_a_curve_comes_to_a_loss() -> None:
    assert muon.reached([4.0, 3.0, 2.0, 1.0], 2.5) == pytest.approx(2.5 / 4)
    assert muon.reached([4.0, 3.0], 3.0) == 1.0
    assert muon.reached([4.0, 3.0], 4.5) == pytest.approx(1 / 2)
    assert muon.reached([4.0, 3.0], 2.9) is None


def test_the_verdict_is_of_the_means_at_the_best_rates() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "EVALUATIONS", 10)
        down = [10.0 - i for i in range(10)]
        fast = [loss - 4.0 for loss in down]
        tried = {"AdamW": {0.1: down, 0.2: fast}, "Muon": {0.1: fast, 0.2: down}}
        text = muon.report(tried, {"AdamW": down, "Muon": fast}, 100)
    assert "AdamW, best lr 0.2" in text
    assert "final loss of 1.000: 0.600, bar 0.90: kept" in text
    assert muon.best(tried["AdamW"]) == 0.2


def test_nothing_of_the_held_out_texts_is_trained_on() -> None:
    train, held_out = (bytes(muon.texts(split).tolist()).decode() for split in ("train", "held out"))
    assert len(train) > 150_000
    assert not set(train.split("\n\n")) & set(held_out.split("\n\n"))

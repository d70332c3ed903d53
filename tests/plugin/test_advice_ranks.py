"""Two ranks: one speaks and writes, and all decide alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from orbit.core.checkpoint import is_valid, list_checkpoints
from tests.ranks import on_ranks

CASES = "tests.plugin.advice_cases"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_keep_the_same_checkpoints(parallel: str, tmp_path: Path) -> None:
    first, second = on_ranks(f"{CASES}:best", 2, str(tmp_path), parallel)
    assert first == second
    kept, best, last, _ = first
    assert list(kept.values()) == [1.0, 1.0]  # of epochs 0 and 2: the second was best on rank 0 alone
    written = list_checkpoints(tmp_path)
    assert {path.name for path in written} == {*kept, last}
    assert all(is_valid(path) for path in written)
    assert all(path.is_dir() == (parallel == "fsdp") for path in written)
    assert best in kept


def test_confusions_add_up_over_ranks() -> None:
    (found, f1, spoke), (same, other, silent) = on_ranks(f"{CASES}:confusion", 2)
    assert found == same == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 1, 3, 0], [0, 0, 1, 0]]
    assert f1 == other
    assert (spoke, silent) == (True, False)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_are_advised_together(parallel: str) -> None:
    first, second = on_ranks(f"{CASES}:advised", 2, parallel)
    assert first["same"]
    assert second["same"]
    assert first["succeeded"] is second["succeeded"] is True
    assert (first["step"], first["loss"]) == (second["step"], second["loss"])
    assert "memorised the batch by step" in first["printed"]
    assert "peak, estimated" in first["printed"]
    assert second["printed"] == ""
    whole = first["total"] * 4
    assert first["total"] == second["total"]
    shares = [rank["parameters"] for rank in (first, second)]
    assert shares == [whole, whole] if parallel == "ddp" else sum(shares) == whole
    assert all(
        2 * share <= rank["optimizer"] < 2.2 * share
        for share, rank in zip(shares, (first, second), strict=True)
    )
    assert first["suggested"] > 0

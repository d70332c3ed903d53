"""On two ranks an optimizer does what it does in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.optim import rank_cases
from tests.ranks import on_ranks


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest, over model and moments, against the largest change of training."""
    start = rank_cases.run("sam", None, 1, steps=0)["model"]
    moved = max((one["model"][key] - start[key]).abs().max().item() for key in start)
    pairs = [(one["model"][key], other["model"][key]) for key in one["model"]]
    assert one["moments"].keys() == other["moments"].keys()
    for number, entries in one["moments"].items():
        pairs += [(entries[name], other["moments"][number][name]) for name in entries]
    return max((a - b).abs().max().item() for a, b in pairs) / moved


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", rank_cases.OPTIMIZERS)
def test_two_ranks_are_one_process(name: str, parallel: str) -> None:
    """Windows of two micro-batches a rank. Newton-Schulz runs in bfloat16, where a last bit is a hundredth."""
    alone = rank_cases.run(name, None, 1)
    ranks = on_ranks("tests.optim.rank_cases:run", 2, name, parallel, 2)
    assert difference(ranks[0], ranks[1]) == 0.0
    assert difference(alone, ranks[0]) <= (0.03 if name == "muon" else 1e-9)


@pytest.mark.parametrize("name", ["sam", "muon"])
def test_a_sharded_run_goes_on_from_its_checkpoint(name: str, tmp_path: Path) -> None:
    whole = on_ranks("tests.optim.rank_cases:run", 2, name, "fsdp", 1)[0]
    folder = str(tmp_path / "run")
    half = on_ranks("tests.optim.rank_cases:run", 2, name, "fsdp", 1, 2, folder)[0]
    assert half["step"] == 2
    resumed = on_ranks("tests.optim.rank_cases:run", 2, name, "fsdp", 1, 4, folder)[0]
    assert difference(whole, resumed) == 0.0
    assert all(torch.equal(whole["model"][key], value) for key, value in resumed["model"].items())

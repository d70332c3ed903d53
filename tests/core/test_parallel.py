"""Several processes: one run, however many ranks it has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core import parallel_cases
from tests.ranks import on_ranks

CASES = "tests.core.parallel_cases:train"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted runs of 20 steps with their checkpoints, by "ways" of running."""
    made: dict[str, Any] = {}
    for adapters in (False, True):
        for way, ranks in (("one", 1), ("ddp", 2), ("fsdp", 2)):
            folder = tmp_path_factory.mktemp(f"{way}{ranks}")
            made[way, ranks, adapters] = folder, run(way, ranks, folder, 20, adapters)
    return made


def run(way: str, ranks: int, folder: Path | None, steps: int, adapters: bool) -> dict[str, Any]:
    where = None if folder is None else str(folder)
    if ranks == 1:
        return parallel_cases.train(way, where, steps, adapters)
    results = on_ranks(CASES, ranks, way, where, steps, adapters)
    for other in results[1:]:
        assert different(other, results[0]) == 0.0, "all ranks have the same state and losses"
        assert other["losses"] == results[0]["losses"]
    return results[0]


def different(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two models and their optimizers."""
    assert one["model"].keys() == other["model"].keys()
    pairs = [(value, other["model"][key]) for key, value in one["model"].items()]
    assert one["optimizer"].keys() == other["optimizer"].keys()
    for number, entries in one["optimizer"].items():
        pairs += [(value, other["optimizer"][number][name]) for name, value in entries.items()]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
def test_ranks_and_shards_change_nothing(saved: dict[str, Any], adapters: bool) -> None:
    _, alone = saved["one", 1, adapters]
    for way in ("ddp", "fsdp"):
        _, there = saved[way, 2, adapters]
        assert different(alone, there) < 1e-6
        assert there["losses"] == pytest.approx(alone["losses"], rel=0, abs=2e-6)
        assert there["metrics"] == pytest.approx(alone["metrics"], abs=2e-6)


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
@pytest.mark.parametrize("written", [("ddp", 2), ("fsdp", 2), ("one", 1)], ids=["ddp2", "fsdp2", "one"])
@pytest.mark.parametrize(
    "read",
    [("one", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 3), ("fsdp", 3)],
    ids=lambda way: f"{way[0]}{way[1]}",
)
def test_a_checkpoint_goes_on_on_any_number_of_ranks(
    saved: dict[str, Any], tmp_path: Path, adapters: bool, written: tuple[str, int], read: tuple[str, int]
) -> None:
    folder, whole = saved[(*written, adapters)]
    for kept in sorted(folder.glob("checkpoint_step_10*")):
        if kept.is_dir():
            shutil.copytree(kept, tmp_path / kept.name)
        else:
            shutil.copy(kept, tmp_path)
    resumed = run(*read, tmp_path, 20, adapters)
    assert len(resumed["losses"]) == 10
    assert resumed["losses"] == pytest.approx(whole["losses"][10:], rel=0, abs=2e-6)
    if written == read:
        assert different(resumed, whole) == 0.0
        assert resumed["losses"] == whole["losses"][10:]
    else:
        assert different(resumed, whole) < 1e-6


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_only_adapters_train(saved: dict[str, Any], way: str) -> None:
    torch.manual_seed(0)
    fresh = parallel_cases.Net().state_dict()
    _, there = saved[way, 2, True]
    base = {key: value for key, value in there["model"].items() if "lora_" not in key}
    assert there["trains"] == len(there["model"]) - len(base) > 0
    assert all(torch.equal(value, fresh[key]) for key, value in base.items())

"""Several processes: one run, however many ranks it has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orbit.engine import Engine
from tests.core import parallel_cases
from tests.ranks import on_ranks

CASES = "tests.core.parallel_cases:train"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Uninterrupted runs of 10 steps with their checkpoints, by "ways" of running."""
    made: dict[str, Any] = {}
    for adapters in (False, True):
        for way, ranks in (("one", 1), ("ddp", 2), ("fsdp", 2)):
            folder = tmp_path_factory.mktemp(f"{way}{ranks}")
            made[way, ranks, adapters] = folder, run(way, ranks, folder, 10, adapters)
    return made


def test_shards_are_written_beside_the_training(saved: dict[str, Any], tmp_path: Path) -> None:
    written = on_ranks(CASES + "_beside", 2, str(tmp_path))
    _, whole = saved["fsdp", 2, False]
    assert parallel_cases.different(written[0], whole) == 0.0
    assert sorted(path.name for path in tmp_path.glob("checkpoint_step_*")) == [
        "checkpoint_step_10",
        "checkpoint_step_5",
    ]
    shutil.rmtree(tmp_path / "checkpoint_step_10")
    assert parallel_cases.different(run("fsdp", 2, tmp_path, 10, False), whole) == 0.0


def run(way: str, ranks: int, folder: Path | None, steps: int, adapters: bool) -> dict[str, Any]:
    where = None if folder is None else str(folder)
    if ranks == 1:
        return parallel_cases.train(way, where, steps, adapters)
    results = on_ranks(CASES, ranks, way, where, steps, adapters)
    for other in results[1:]:
        assert parallel_cases.different(other, results[0]) == 0.0, "all ranks have the same state and losses"
        assert other["losses"] == results[0]["losses"]
    return results[0]


@pytest.mark.parametrize("adapters", [False, True], ids=["model", "adapters"])
def test_ranks_and_shards_change_nothing(saved: dict[str, Any], adapters: bool) -> None:
    _, alone = saved["one", 1, adapters]
    for way in ("ddp", "fsdp"):
        _, there = saved[way, 2, adapters]
        assert parallel_cases.different(alone, there) < 1e-6
        assert there["losses"] == pytest.approx(alone["losses"], rel=0, abs=2e-6)
        assert there["metrics"] == pytest.approx(alone["metrics"], abs=2e-6)


@pytest.mark.parametrize(
    ("written", "read", "adapters"),
    [  # all of them are in the fault suite (faults/reshard.py)
        (("ddp", 2), ("ddp", 2), False),
        (("ddp", 2), ("fsdp", 3), True),
        (("fsdp", 2), ("fsdp", 2), True),
        (("fsdp", 2), ("one", 1), False),
        (("fsdp", 2), ("ddp", 3), False),
        (("one", 1), ("fsdp", 2), True),
    ],
    ids=str,
)
def test_a_checkpoint_goes_on_on_any_number_of_ranks(
    saved: dict[str, Any], tmp_path: Path, adapters: bool, written: tuple[str, int], read: tuple[str, int]
) -> None:
    folder, whole = saved[(*written, adapters)]
    for kept in sorted(folder.glob("checkpoint_step_5*")):
        if kept.is_dir():
            shutil.copytree(kept, tmp_path / kept.name)
        else:
            shutil.copy(kept, tmp_path)
    resumed = run(*read, tmp_path, 10, adapters)
    assert len(resumed["losses"]) == 5
    assert resumed["losses"] == pytest.approx(whole["losses"][5:], rel=0, abs=2e-6)
    if written == read:
        assert parallel_cases.different(resumed, whole) == 0.0
        assert resumed["losses"] == whole["losses"][5:]
    else:
        assert parallel_cases.different(resumed, whole) < 1e-6


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_only_adapters_train(saved: dict[str, Any], way: str) -> None:
    torch.manual_seed(0)
    fresh = parallel_cases.Net().state_dict()
    _, there = saved[way, 2, True]
    base = {key: value for key, value in there["model"].items() if "lora_" not in key}
    assert there["trains"] == len(there["model"]) - len(base) > 0
    assert all(torch.equal(value, fresh[key]) for key, value in base.items())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_window_over_ranks_has_the_gradient_of_its_whole(way: str) -> None:
    """Accumulation 1 to 8, rows of 4 to 40 tokens, one with none, a last batch that one rank has less of."""
    dtypes = [torch.float64, torch.float32]
    there = on_ranks("tests.core.parallel_cases:windows", 2, way, dtypes)
    for dtype in dtypes:
        for n in (1, 2, 4, 8):
            alone = parallel_cases.gradient("one", dtype, n, rows_at_once=6)
            for rank in there:
                for own, whole in zip(rank[dtype, n], alone, strict=True):
                    worst = ((own - whole).norm() / whole.norm()).item()
                    assert worst <= (1e-10 if dtype is torch.float64 else 2e-6), (dtype, n)


def test_ranks_agree() -> None:
    one, other = on_ranks("tests.core.parallel_cases:agree", 2)
    assert one["stop"] == other["stop"] == 4  # heard at the end of the window after the wish
    assert "have 3, 4 batches" in one["unequal"]
    assert one["unequal"] == other["unequal"]
    assert one["unsized"] == other["unsized"] == (3, 1)
    for kind in ("drop", "drop16", "drop_fsdp", "drop16_fsdp"):
        assert one[kind] == other[kind]
        assert one[kind]["dropped"][0] == 2
        assert set(one[kind]["same"]) == {True}
        assert one[kind]["step"] == 6
        assert one[kind]["weights"] == pytest.approx(one[kind.removesuffix("_fsdp")]["weights"], abs=1e-4)
    assert one["drop"]["dropped"] == [2]
    assert one["drop16"]["scale"] == 2.0 ** (16 - len(one["drop16"]["dropped"])), "halved on both ranks"
    assert one["skips"] == other["skips"]


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    one, other = on_ranks("tests.core.parallel_cases:leaves_together", 2, str(tmp_path))
    assert one == other == (4, 128 + 15)
    assert (tmp_path / "checkpoint_step_4.pt").exists()


def test_the_users_own_wrapping() -> None:
    alone = parallel_cases.own_way("none")
    for rank in on_ranks("tests.core.parallel_cases:own_ways", 2):
        for wrap in ("ddp", "fsdp2"):
            assert all(
                torch.allclose(rank[wrap][key], value, atol=1e-6, rtol=0) for key, value in alone.items()
            )


def test_fsdp1_is_refused_with_the_way_to_fsdp2() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(
        FullyShardedDataParallel
    )  # its constructor wants an accelerator
    torch.nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = parallel_cases.Net()
    own = parallel_cases.Own("none")
    own.build_model = lambda: torch.nn.Sequential(wrapper)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"0 is wrapped by FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        own.train()


def test_shards_that_cannot_be_written_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    one, other = on_ranks("tests.core.parallel_cases:refused_shards", 2, str(tmp_path))
    for error in (one, other):
        assert "rank 1: [Errno 27] File too large" in error
        assert "bytes are free there" in error
    assert not list(tmp_path.rglob("*step*"))


def test_replicas_of_shards() -> None:
    alone = on_ranks("tests.core.parallel_cases:train", 2, "ddp", None, 6)[0]["model"]
    for rank in on_ranks("tests.core.parallel_cases:hybrid", 4):
        assert all(torch.allclose(rank[key], value, atol=1e-6, rtol=0) for key, value in alone.items())


def test_a_frozen_base_is_not_exchanged() -> None:
    assert on_ranks("tests.core.parallel_cases:exchanged", 2) == [3 * 2 * (8 + 16)] * 2


def test_without_torchrun_it_says_how_to_start() -> None:
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node N"):
        Engine(torch.nn.Linear(2, 1), plugins=[], parallel="ddp", device="cpu")
    with pytest.raises(ValueError, match=r"mesh=\(2, 2\) means nothing to parallel='ddp'"):
        Engine(torch.nn.Linear(2, 1), plugins=[], parallel="ddp", mesh=(2, 2), device="cpu")
    with pytest.raises(ValueError, match="parallel='dpp' is unknown"):
        Engine(torch.nn.Linear(2, 1), plugins=[], parallel="dpp", device="cpu")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_averages_follow_over_ranks(way: str, tmp_path: Path) -> None:
    alone = parallel_cases.averaged("one", None, 8)
    whole = on_ranks("tests.core.parallel_cases:averaged", 2, way, str(tmp_path), 8)
    shutil.rmtree(tmp_path / "checkpoint_step_8", ignore_errors=True)
    (tmp_path / "checkpoint_step_8.pt").unlink(missing_ok=True)
    resumed = on_ranks("tests.core.parallel_cases:averaged", 2, way, str(tmp_path), 8)
    for rank in range(2):
        assert whole[rank]["val_loss"] == pytest.approx(alone["val_loss"], abs=2e-6)
        assert resumed[rank]["val_loss"] == whole[rank]["val_loss"]
        for key, value in alone["ema"].items():
            assert torch.allclose(whole[rank]["ema"][key], value, atol=1e-6, rtol=0)
            assert torch.equal(resumed[rank]["ema"][key], whole[rank]["ema"][key])

"""LoggingHook and ProgressHook, alone and over ranks."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plugin import rank_cases
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
CASES = "tests.plugin.rank_cases"


def mean(steps: list[list[tuple[float, float]]]) -> float:
    """The mean over steps of Σ wᵢ·lossᵢ / Σ wᵢ."""
    losses = [sum(loss * w for loss, w in step) / sum(w for _, w in step) for step in steps]
    return sum(losses) / len(losses)


def together(ranks: list[Any]) -> list[list[tuple[float, float]]]:
    """The micro-batches of every step, of all ranks."""
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


def test_logged_means_over_ranks_are_weighed_as_the_gradient_is() -> None:
    (told, steps), (other, more) = on_ranks(f"{CASES}:logged", 2, True)
    both = together([steps, more])
    for number, ((records, dry), (same, dry_there)) in enumerate(zip(told, other, strict=True)):
        assert records == same
        assert (dry, dry_there) == (False, True)
        assert records["loss"] == pytest.approx(mean(both[2 * number : 2 * number + 2]), rel=1e-6)
        units = [w for step in steps[2 * number : 2 * number + 2] for _, w in step]
        assert records["zero"]["units"] == pytest.approx(sum(units) / 4), "of the rank that has it"
        first = [step[0][1] for step in more[2 * number : 2 * number + 2]]
        assert records["one"] == pytest.approx(sum(first) / 2)
        assert {"grad_norm", "lr_0", "step_time", "data_time"} < records.keys()
    assert len(told) == 2


def test_without_sync_every_rank_has_its_own() -> None:
    ranks = on_ranks(f"{CASES}:logged", 2, False)
    for told, steps in ranks:
        for number, (records, _) in enumerate(told):
            assert records["loss"] == pytest.approx(mean(steps[2 * number : 2 * number + 2]), rel=1e-6)
    assert "one" not in ranks[0][0][0][0]
    assert "zero" not in ranks[1][0][0][0]


def test_one_process_needs_no_ranks() -> None:
    assert rank_cases.logged(True)[0][0][0]["loss"] == rank_cases.logged(False)[0][0][0]["loss"]


def test_ranks_without_records() -> None:
    (told, _), (other, _) = on_ranks(f"{CASES}:logged", 2, True, True)
    assert [records for records, _ in told] == [records for records, _ in other]
    assert set(told[0][0]) == {"loss", "grad_norm", "lr_0", "step_time", "data_time"}


@pytest.mark.parametrize("sync", [True, False])
def test_progress_over_ranks(sync: bool) -> None:
    (text, steps), (nothing, more) = on_ranks(f"{CASES}:printed", 2, sync)
    assert nothing == "", "only rank 0 prints"
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Step 2/4", "Step 4/4"]
    shown = [float(loss) for loss in re.findall(r" loss ([0-9.]+)", text)]
    seen = together([steps, more]) if sync else steps
    assert shown == [pytest.approx(mean(seen[:2]), abs=6e-5), pytest.approx(mean(seen[2:]), abs=6e-5)]
    assert all("zero/units" in line and (" one " in line) is sync for line in lines)
    assert all(re.search(r"eta \d+:\d\d:\d\d ", line) for line in lines)


def test_a_rank_whose_data_ends_early_stops_nobody() -> None:
    assert on_ranks(f"{CASES}:ends_early", 2) == [5, 5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_mean_after_a_resume_is_that_of_an_uninterrupted_run(ranks: int, tmp_path: Path) -> None:
    """The checkpoint of step 4 lies in the interval of steps 4 to 6."""

    def run(folder: str, steps: int) -> Any:
        where = str(tmp_path / folder)
        if ranks == 1:
            return rank_cases.resumed(where, steps)[0]
        (first, _), (second, _) = on_ranks(f"{CASES}:resumed", ranks, where, steps)
        assert first == second
        return first

    whole = run("whole", 6)
    assert [step for step, _ in whole] == [3, 6]
    run("cut", 4)
    assert run("cut", 6) == whole[1:]


def test_a_run_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    (_, steps), (_, more) = on_ranks(f"{CASES}:resumed", 2, str(tmp_path), 4)
    told, alone = rank_cases.resumed(str(tmp_path), 6)
    both = together([steps[3:], more[3:]])
    assert told == [(6, pytest.approx(mean([*both, *alone]), rel=1e-6))]


def test_a_batch_that_only_keeps_a_rank_in_step_has_no_records() -> None:
    for told in on_ranks(f"{CASES}:padded", 2):
        assert told == [{"x": 1.0}], "of 0, 1 and 2; the second rank sees a sample again beside the last one"


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    first, second = on_ranks(f"{CASES}:tracked", 2, str(tmp_path))
    assert first == ["events", "metrics", "x", "x"]
    assert second == []

"""The example of several processes does what its first lines say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples import ranks_cases
from tests.ranks import on_ranks


def losses(text: str) -> list[str]:
    return re.findall(r"loss (\S+)", text)


def test_the_losses_are_the_same_and_a_finished_run_stays_finished(tmp_path: Path) -> None:
    alone = losses(ranks_cases.run(None, str(tmp_path / "one")))
    assert len(alone) == 5
    for way in ("ddp", "fsdp"):
        first, other = on_ranks("tests.examples.ranks_cases:run", 2, way, str(tmp_path / way))
        assert list(map(float, losses(first))) == pytest.approx(
            list(map(float, alone)), abs=1.1e-4
        )  # they are rounded
        assert losses(other) == [], "rank 0 speaks"
    again = ranks_cases.run(None, str(tmp_path / "fsdp"))
    assert len(losses(again)) == 1, "one process after two: nothing is left to train"

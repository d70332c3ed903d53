"""The run's options and what looks at a run, on two ranks: as on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.core import options_cases
from tests.ranks import on_ranks

CASES = "tests.core.options_cases:"


def test_one_rank_splits_and_the_other_does_not() -> None:
    first, second = on_ranks(CASES + "splits", 2)
    for case in first:
        assert first[case][1]["tried"][:4] == [8, 4, 2, 2]
        assert second[case][1]["tried"] == [8] * 6
        for before, after in (first[case], second[case]):
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-10)
            for expected, got in zip(before["gradients"], after["gradients"], strict=True):
                assert np.linalg.norm(got - expected) <= 1e-10 * np.linalg.norm(expected)


def test_shards_cannot_be_split_on_one_rank() -> None:
    for answer in on_ranks(CASES + "refused", 2):
        assert 'choose smaller batches, or parallel="ddp"' in answer


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_figures_of_a_run_are_those_of_one_process(parallel: str) -> None:
    alone = options_cases.looked_at(None)
    (first, checkpointed), (second, _) = on_ranks(CASES + "twice", 2, parallel)
    assert first["found"] == second["found"]
    assert first["found"][0] == pytest.approx(alone["found"][0])
    assert first["found"][1] == pytest.approx(alone["found"][1], rel=1e-5)
    assert first["records"] == second["records"]
    assert len(first["records"]) == len(alone["records"]) == 2
    for records, expected in zip(first["records"], alone["records"], strict=True):
        assert records["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        for kind in ("layer", "update"):
            assert records[kind] == pytest.approx(expected[kind], rel=1e-4)
    assert (first["dry"], second["dry"]) == ({False}, {True}), "only rank 0 writes"
    assert first["throughput"] == ["samples_per_second", "tflops"]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(first["weights"][name], value) for name, value in checkpointed["weights"].items())

"""A mixture trained by two processes is what one process trains, and none of its parameters is unused."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import on_ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one_process() -> None:
    for errors in on_ranks("tests.xlora.rank_cases:errors", 2, seconds=200):
        assert len(errors) == 8
        assert {case: error for case, error in errors.items() if error > 2e-5} == {}

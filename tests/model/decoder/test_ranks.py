"""The decoder over several processes ends where one process ends, tied or not."""

import pytest
import torch

from tests.model.decoder.rank_cases import train
from tests.ranks import on_ranks


@pytest.mark.parametrize(("parallel", "tied"), [("ddp", False), ("fsdp", True)])
def test_two_ranks_train_as_one(parallel, tied):
    alone = train(None, tied)
    for rank in on_ranks("tests.model.decoder.rank_cases:train", 2, parallel, tied):
        assert rank.keys() == alone.keys()
        for name, value in rank.items():
            torch.testing.assert_close(value, alone[name], atol=2e-6, rtol=1e-5, msg=name)

"""The decoder over several processes ends where one process ends, tied or not."""

import pytest
import torch

from tests.model.decoder.rank_cases import train
from tests.ranks import on_ranks


@pytest.mark.parametrize("experts", [None, 4])  # their balance is a rank's own, so it is left out
@pytest.mark.parametrize(("parallel", "tied"), [("ddp", False), ("fsdp", True)])
def test_two_ranks_train_as_one(parallel, tied, experts):
    settings = {} if experts is None else {"num_experts": experts, "balance_weight": 0.0}
    alone = train(None, tied, settings)
    for rank in on_ranks("tests.model.decoder.rank_cases:train", 2, parallel, tied, settings):
        assert rank.keys() == alone.keys()
        for name, value in rank.items():
            torch.testing.assert_close(value, alone[name], atol=2e-6, rtol=1e-5, msg=name)

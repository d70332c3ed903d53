"""Law 9: ranks whose rows use different tasks train what one process would train on all the rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orbit.adapter.owners import Down, ModuleSlot, Slot, Up, Whole
from orbit.adapter.routes.ranks import touched
from tests.ranks import on_ranks


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one_process() -> None:
    for errors in on_ranks("tests.adapter.routes.rank_cases:errors", 2, seconds=200):
        assert len(errors) == 14
        assert {case: error for case, error in errors.items() if error > 5e-5} == {}


def test_what_is_touched_gets_zeros_and_changes_nothing() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    one = Slot(Down(torch.randn(2, 3)), Up(torch.randn(4, 2), 2.0))
    other = Slot(Down(torch.randn(2, 3)), Up(torch.randn(4, 2), 2.0))
    module, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    y, rest = touched((x, None), [one, Whole({"weight": other}), ModuleSlot(module), ModuleSlot(frozen)])
    assert torch.equal(y, x)
    assert rest is None
    y.sum().backward()
    for owner in (*one[:2], *other[:2]):
        assert torch.equal(owner.weight.grad, torch.zeros_like(owner.weight))
    assert not module.weight.grad.any()
    assert frozen.weight.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))

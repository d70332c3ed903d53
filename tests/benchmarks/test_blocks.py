"""The blocks' benchmark at a tiny size: every line is measured, and other work is noticed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks.block_pairs import HandWrittenAttention, Pass, Sizes, check_same
from benchmarks.blocks import GROUPS
from benchmarks.measuring import Setting

TINY = Sizes(hidden=32, heads=4, batch=2, length=8, intermediate=16, tokens=64, vocabulary=64, layers=1)
LINES = {"attention": 12, "rope": 4, "moe": 6, "init": 1}


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_gives_its_lines(group: str) -> None:
    lines = list(GROUPS[group](Setting(TINY, "cpu", 1, time.perf_counter)))
    assert len(lines) == LINES[group]
    assert all(line.ratio > 0 and line.bar is not None and line.detail for line in lines)


def test_other_work_is_noticed() -> None:
    x = torch.randn(2, 8, 32)
    one, other = (HandWrittenAttention(32, 4, 2) for _ in range(2))
    other.load_state_dict(one.state_dict())
    check_same(Pass(one, [x]), Pass(other, [x]), "alike")
    with torch.no_grad():
        other.o_proj.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="cheat: result 0 differs by"):
        check_same(Pass(one, [x]), Pass(other, [x]), "cheat")
    doubled = nn.Hardtanh(-1e9, 1e9)  # the same values
    doubled.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],))
    with pytest.raises(AssertionError, match="cheat: result 1 differs by"):
        check_same(Pass(doubled, [x]), Pass(lambda x: x * 1, [x]), "cheat")

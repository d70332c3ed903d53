"""The adapters' benchmark at a tiny size: every line is measured, and other work is noticed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from benchmarks.adapter_pairs import Shape, Training, check_training, training_pair
from benchmarks.adapters import GROUPS, saved_bytes
from benchmarks.measuring import Line, Setting, median_ratio
from orbit.adapter import adapter_parameters

TINY = Shape(hidden=32, layers=1, vocabulary=64, intermediate=48, heads=2, batch=2, length=8)


@pytest.mark.filterwarnings("ignore")  # PEFT's and the profiler's own
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_gives_its_lines(group: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.adapters.DECODED", 2)
    lines = list(GROUPS[group](Setting(TINY, "cpu", 1, time.perf_counter)))
    assert len(lines) >= 4
    assert all(line.ratio == line.ratio and line.detail for line in lines)
    assert any(line.bar is not None for line in lines)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
def test_other_work_is_noticed(dora: bool):
    base = TINY.model(torch.float32, "cpu")
    mine, theirs = training_pair(base, TINY.tokens("cpu"), dora=dora)
    with torch.no_grad():
        for parameter in adapter_parameters(mine.model).values():
            parameter.mul_(1.01)
    with pytest.raises(AssertionError, match="cheat logits before step 0: ours and PEFT's differ by"):
        check_training(mine, theirs, "cheat")


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.randn(4, 4))
            self.x = torch.randn(3, 4)

        def forward(self, **_: object) -> object:
            y = self.x @ self.W  # keeps x and W
            z = (self.x @ self.W).exp()  # keeps x, W and z
            return type("Output", (), {"loss": (y + z).sum()})

    model = Model()
    assert saved_bytes(Training(model, model.parameters(), torch.zeros(1))) == 4 * (12 + 12)


def test_ratios_are_taken_within_a_round():
    assert median_ratio([1, 20, 300], [2, 40, 600]) == 0.5
    assert median_ratio([3, 5, 9], [5, 9, 17], [1, 1, 1]) == 0.5
    assert Line("m", 0.5, 0.4, "d").cells()[3] == "MISSED"
    assert Line("m", 0.4, 0.4, "d").cells()[3] == "met"

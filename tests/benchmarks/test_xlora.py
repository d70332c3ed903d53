"""The benchmark of mixtures at a tiny size: every line is measured, and other work is noticed."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.adapter_pairs import Shape
from benchmarks.measuring import Setting
from benchmarks.xlora import GROUPS, Pair

TINY = Shape(hidden=32, layers=1, vocabulary=64, intermediate=48, heads=2, batch=2, length=8)
SETTING = Setting(TINY, "cpu", 1, time.perf_counter)


@pytest.mark.filterwarnings("ignore")  # PEFT's and the profiler's own
@pytest.mark.parametrize("group", GROUPS)
def test_every_group_gives_its_lines(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.xlora.NEW", 3)
    lines = list(GROUPS[group](SETTING))
    assert len(lines) == 8  # a figure and what to compare it with, two numbers of experts, two dtypes
    assert all(line.ratio == line.ratio and line.ratio > 0 and line.detail for line in lines)
    assert sum(line.bar is not None for line in lines) == (3 if group == "generate" else 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("part", "what"), [("lora_B", "logits"), ("xlora_classifier", "logits")])
def test_other_work_is_noticed(part: str, what: str) -> None:
    pair = Pair.of(SETTING, 4, torch.float32)
    with torch.no_grad():
        for name, parameter in pair.mine.named_parameters():
            if part in name:
                parameter.mul_(1.5)
    with pytest.raises(AssertionError, match=f"mixture's {what}: ours and PEFT's differ by"):
        pair.check(SETTING)

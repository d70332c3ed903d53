"""Traces of the steps that were asked for, and of no others; nothing is left running."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from orbit.engine import Engine
from orbit.plugin import Profiler
from tests import tiny


def running() -> bool:
    return torch.autograd._profiler_enabled()


def train(plugin: Profiler, steps: int, **options: Any) -> nn.Module:
    model = tiny.model()
    torch.manual_seed(7)
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu", **options
    )
    for _ in engine.train(tiny.loader(), max_steps=steps):
        engine.auto_update()
    return model


def steps_in(trace: Path) -> int:
    events = json.loads(trace.read_text())["traceEvents"]
    return len({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


def test_traces_lie_after_the_steps_they_show(tmp_path: Path) -> None:
    shown = io.StringIO()
    plugin = Profiler(
        tmp_path, wait=1, warmup=1, active=2, repeat=2, rows=3, shapes=True, memory=True, stack=True,
        console=Console(file=shown),
    )  # fmt: skip
    plain = tiny.model()
    traced = train(plugin, 12)
    assert [trace.name for trace in plugin.traces] == [
        "rank0_step_4.pt.trace.json",
        "rank0_step_8.pt.trace.json",
    ]
    assert [steps_in(trace) for trace in plugin.traces] == [2, 2]
    assert "Self CPU" in shown.getvalue()
    assert not running()
    torch.manual_seed(7)
    engine = Engine(plain, tiny.optimizer(plain), nn.CrossEntropyLoss(), plugins=[], device="cpu")
    for _ in engine.train(tiny.loader(), max_steps=12):
        engine.auto_update()
    assert tiny.same(plain, traced)


def test_a_run_that_ends_inside_a_cycle_writes_what_it_saw(tmp_path: Path) -> None:
    plugin = Profiler(tmp_path, wait=0, warmup=1, active=5, rows=0)
    train(plugin, 3)
    assert [trace.name for trace in plugin.traces] == ["rank0_step_3.pt.trace.json"]
    assert not running()


def test_a_trace_that_cannot_be_written_is_that_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        train(Profiler(tmp_path / "file", wait=0, warmup=1, active=1, rows=0), 3)
    assert not running()


def test_a_relative_path_lies_in_the_workspace(tmp_path: Path) -> None:
    plugin = Profiler(wait=0, warmup=1, active=1, rows=0)
    tiny.Trainer(2, plugins=[plugin], workspace=tmp_path).train()
    assert [trace.parent for trace in plugin.traces] == [tmp_path / "profile"]


def test_values_outside_their_range() -> None:
    with pytest.raises(ValueError, match="active=0"):
        Profiler(active=0)
    with pytest.raises(ValueError, match=r"memory_snapshot=True\) on cpu"):
        train(Profiler(memory_snapshot=True), 1)

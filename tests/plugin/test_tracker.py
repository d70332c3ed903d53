from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import CheckpointingHook, LoggingHook, MetricsFile, Plugin
from tests import tiny


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def engine(*plugins: Plugin) -> Engine:
    model = tiny.model()
    return Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu")


def test_it_averages_steps_and_keeps_the_epochs_metrics(tmp_path: Path) -> None:
    class Losses(Plugin):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_after_step(self, trainer: Any) -> None:
            self.seen.append(float(trainer.step_info["loss"]))

    losses = Losses()
    run = engine(MetricsFile(tmp_path / "a" / "m.jsonl", 3), losses)
    for _ in run.train(tiny.loader(), num_epochs=2):  # seven steps an epoch
        run.auto_update()
        if run.is_epoch_end:
            for _ in run.eval(tiny.loader()):
                run.auto_update()
    found = lines(tmp_path / "a" / "m.jsonl")
    assert [line["step"] for line in found] == [3, 6, 7, 9, 12, 14]
    for line in found:
        step = line["step"]
        if step % 3 == 0:
            assert line["loss"] == pytest.approx(sum(losses.seen[step - 3 : step]) / 3)
            assert {"grad_norm", "lr_0", "step_time", "data_time"} <= line.keys()
        else:
            assert line.keys() == {"step", "epoch/train_loss", "epoch/val_loss", "epoch/val_acc"}


def test_it_keeps_what_the_user_logs_and_a_logging_hook_gives(tmp_path: Path) -> None:
    class Trainer(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            if self.step == 1:
                self.log({"own": {"a": torch.tensor(0.5), "b": math.nan}}, dry_run=False)
                self.log({"not": 1.0}, dry_run=True)
            return super().forward(input)

    hooks = [MetricsFile("m.jsonl", 1), LoggingHook(2)]
    Trainer(4, hooks, workspace=tmp_path).train()
    found = lines(tmp_path / "m.jsonl")
    assert found[0] == {"step": 1, "own/a": 0.5, "own/b": None}
    assert [line["step"] for line in found[1:]] == [2, 4]
    assert "accuracy" in found[1]


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> Path:
        torch.manual_seed(5)
        hooks: list[Plugin] = [
            MetricsFile("m.jsonl", 2),
            CheckpointingHook(3, path="c", exit_signals=[], every_epoch=False),
        ]
        tiny.Trainer(steps, hooks, workspace=folder).train()
        return folder / "m.jsonl"

    def told(path: Path) -> list[Any]:
        return [{k: v for k, v in line.items() if not k.endswith("_time")} for line in lines(path)]

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "cut", 6)
    path = tmp_path / "cut" / "m.jsonl"
    with path.open("a") as file:  # steps that no checkpoint has, and a line that a kill cut short
        file.write('{"step": 8, "loss": 9.0}\n{"step": 10, "lo')
    assert told(train(tmp_path / "cut", 12)) == told(whole)
    assert [line["step"] for line in lines(path)] == [line["step"] for line in lines(whole)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["c", "m.jsonl"]


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match=r"MetricsFile\(interval=0\)"):
        MetricsFile(interval=0)

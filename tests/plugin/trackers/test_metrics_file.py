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
from tests import tiny, tracked


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


def test_no_evaluation_is_lost_within_an_epoch_and_at_the_runs_end(tmp_path: Path) -> None:
    class Trainer(tiny.Trainer):
        def build_val_loader(self) -> Any:
            return tiny.loader()

    Trainer(
        10, [MetricsFile("m.jsonl", 100)], workspace=tmp_path, eval_interval=4
    ).train()  # 7 steps an epoch
    found = {line["step"]: line for line in lines(tmp_path / "m.jsonl")}
    assert list(found) == [4, 7, 8, 10]
    assert found[4]["val_loss"] == found[7]["epoch/val_loss"]
    assert found[4]["val_loss"] > found[8]["val_loss"] > found[10]["val_loss"]
    assert {"step", "val_loss", "val_accuracy"} == found[10].keys()


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


@pytest.mark.parametrize("face", tracked.FACES)
@pytest.mark.parametrize("interval", [2, 3])
def test_a_killed_run_leaves_the_file_of_an_uninterrupted_one(
    interval: int, face: str, tmp_path: Path
) -> None:
    """Also in the middle of an interval, and what was logged at the checkpoint's step before it and after."""

    def told(path: Path) -> list[Any]:
        return [{k: v for k, v in line.items() if not k.endswith("_time")} for line in lines(path)]

    tracked.train(face, tmp_path, [MetricsFile(tmp_path / "whole", interval)], 8)
    with pytest.raises(tracked.Killed):
        tracked.train(face, tmp_path / "cut", [MetricsFile(tmp_path / "m", interval)], 8, dies_at=6)
    tracked.train(face, tmp_path / "cut", [MetricsFile(tmp_path / "m", interval)], 8)
    assert told(tmp_path / "m") == told(tmp_path / "whole")


def test_two_of_a_kind_keep_apart(tmp_path: Path) -> None:
    def pair(folder: Path) -> list[Plugin]:
        return [MetricsFile(folder / "a", 2), MetricsFile(folder / "b", 3)]

    tracked.train("trainer", tmp_path, pair(tmp_path / "whole"), 8)
    with pytest.raises(tracked.Killed):
        tracked.train("trainer", tmp_path / "cut", pair(tmp_path / "cut"), 8, dies_at=6)
    tracked.train("trainer", tmp_path / "cut", pair(tmp_path / "cut"), 8)
    for name in ("a", "b"):
        losses = [[line.get("loss") for line in lines(tmp_path / run / name)] for run in ("whole", "cut")]
        assert losses[0] == losses[1]


def test_bad_interval() -> None:
    with pytest.raises(ValueError, match=r"MetricsFile\(interval=0\)"):
        MetricsFile(interval=0)

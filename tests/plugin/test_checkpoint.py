from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.core import Plugin
from orbit.core.checkpoint import list_checkpoints, load_checkpoint
from orbit.core.checkpoint.lock import FolderLock, WorkspaceLockedError
from orbit.engine import Engine
from orbit.plugin import EMA, Checkpoint, CheckpointingHook, MetricError
from tests import tiny


def engine(*plugins: Plugin) -> Engine:
    made = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu")
    made.optimizer = tiny.optimizer(made.model)
    return made


def epochs(plugin: Checkpoint, values: list[float], *others: Plugin, state: Any = None) -> Engine:
    """One value of "score" an epoch, of two steps."""
    run = engine(plugin, *others)
    if state is not None:
        run.load_state_dict(state)
    for _ in run.train(tiny.loader(16), num_epochs=len(values)):
        run.auto_update()
        if run.is_epoch_end:
            run.metrics["score"] = values[run.epoch]
    return run


def files(folder: Path) -> list[int]:
    return [int(path.stem.rsplit("_", 1)[1]) for path in list_checkpoints(folder)]


@pytest.mark.parametrize(
    ("values", "k", "mode", "steps", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0], 1, "min", [4], 4),
        ([3.0, 1.0, 2.0, 4.0], 2, "min", [4, 6], 4),
        ([3.0, 1.0, 2.0, 4.0], 2, "max", [2, 8], 8),
        ([3.0, 1.0, 2.0, 4.0], -1, "min", [2, 4, 6, 8], 4),
        ([1.0, 1.0, 1.0], 1, "min", [2], 2),  # equal is not better
        ([math.nan, 2.0, math.nan, 3.0], 2, "min", [4, 8], 4),
        ([math.inf, 2.0, -math.inf], 3, "max", [4], 4),
        ([math.nan, 2.0, math.nan], -1, "max", [2, 4, 6], 4),
    ],
)
def test_the_best_are_kept(
    values: list[float], k: int, mode: str, steps: list[int], best: int, tmp_path: Path
) -> None:
    plugin = Checkpoint("score", mode, save_top_k=k, path=tmp_path)
    epochs(plugin, values)
    assert files(tmp_path) == steps
    assert plugin.best_path == tmp_path / f"checkpoint_step_{best}.pt"
    assert plugin.best_score == values[best // 2 - 1]
    assert not (tmp_path / "checkpoint_latest.pt").exists()


def test_nan_alone_keeps_nothing(tmp_path: Path) -> None:
    plugin = Checkpoint("score", "min", path=tmp_path)
    epochs(plugin, [math.nan, math.nan])
    assert files(tmp_path) == []
    assert plugin.best_path is plugin.best_score is None


def test_the_last_is_kept_beside_the_best_and_linked(tmp_path: Path) -> None:
    plugin = Checkpoint("score", "min", save_last=True, path=tmp_path)
    epochs(plugin, [3.0, 1.0, 2.0, 4.0])
    assert files(tmp_path) == [4, 8]
    assert plugin.last_path == tmp_path / "checkpoint_step_8.pt"
    assert (tmp_path / "checkpoint_latest.pt").resolve() == plugin.last_path
    only_last = Checkpoint("score", "min", save_top_k=0, save_last=True, path=tmp_path / "last")
    epochs(only_last, [3.0, 1.0])
    assert files(tmp_path / "last") == [4]
    assert only_last.best_path is None


def test_without_a_monitor_the_newest_is_the_best(tmp_path: Path) -> None:
    plugin = Checkpoint(path=tmp_path)
    epochs(plugin, [1.0, 2.0, 3.0])
    assert files(tmp_path) == [6]
    assert plugin.best_path == tmp_path / "checkpoint_step_6.pt"
    assert plugin.best_score is None


def test_a_best_state_is_the_run_as_it_was_when_measured(tmp_path: Path) -> None:
    """Evaluation in the middle of an epoch, with averaged weights swapped in: the file has the run's own state."""
    plugin, seen = Checkpoint("val_loss", path=tmp_path, save_top_k=-1), {}
    run = engine(EMA(0.5), plugin)
    for _ in run.train(tiny.loader(), num_epochs=1):
        run.auto_update()
        if run.step in (2, 5):
            for _ in run.eval(tiny.loader(20)):
                run.auto_update()
            seen[run.step] = [
                run.metrics["val_loss"],
                {k: v.clone() for k, v in run.model.state_dict().items()},
            ]
    assert files(tmp_path) == [2, 5]  # the end measured nothing new
    for step, (loss, weights) in seen.items():
        state = load_checkpoint(tmp_path / f"checkpoint_step_{step}.pt")
        assert plugin.kept[f"checkpoint_step_{step}.pt"] == loss
        assert all(torch.equal(state["model"][key], value) for key, value in weights.items())
    assert plugin.best_path is not None
    resumed = engine(EMA(0.5))
    resumed.load(plugin.best_path)
    for _ in resumed.train(tiny.loader(), num_epochs=1):
        resumed.auto_update()
    assert tiny.same(resumed.model, run.model)


def test_at_an_epochs_end_the_epoch_is_complete_in_the_file(tmp_path: Path) -> None:
    """The evaluation belongs to the last step, and the state to the epoch's end: one file, with all metrics."""
    run = engine(Checkpoint("val_loss", save_top_k=-1, path=tmp_path))
    run.run(tiny.loader(16), tiny.loader(20), num_epochs=2)
    assert files(tmp_path) == [2, 4]
    state = load_checkpoint(tmp_path / "checkpoint_step_2.pt")["state"]
    assert state["epoch_done"]
    assert set(state["metrics"]) == {"train_loss", "val_loss", "val_acc"}


def test_every_n_steps_by_what_the_steps_report(tmp_path: Path) -> None:
    """Under BaseTrainer, which has no evaluation of its own: the mean of a record since the last look."""

    class Record(Plugin):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_after_step(self, trainer: Any) -> None:
            self.values += [float(records["accuracy"]) for records in trainer.step_info["records"]]

    plugin, record = Checkpoint("accuracy", every_n_train_steps=3, save_top_k=-1, path="best"), Record()
    tiny.Trainer(max_steps=10, plugins=[plugin, record], workspace=tmp_path).train()
    assert plugin.mode == "max"
    assert files(tmp_path / "best") == [3, 6, 9, 10]
    means = [sum(record.values[a:b]) / (b - a) for a, b in ((0, 3), (3, 6), (6, 9), (9, 10))]
    assert list(plugin.kept.values()) == pytest.approx(means)


def test_a_window_that_runs_across_the_epochs_end_is_saved_at_its_step(tmp_path: Path) -> None:
    """7 batches an epoch, windows of 2: the first epoch ends inside step 4."""
    plugin = Checkpoint("train_loss", save_top_k=-1, path=tmp_path)
    tiny.Trainer(max_steps=7, gradient_accumulation_steps=2, plugins=[plugin]).train()
    assert files(tmp_path) == [4, 7]


def test_it_goes_on_after_a_resume(tmp_path: Path) -> None:
    values = [3.0, 1.0, 2.0, 0.5]
    whole = Checkpoint("score", "min", save_top_k=2, path=tmp_path / "whole")
    epochs(whole, values)
    first = Checkpoint("score", "min", save_top_k=2, path=tmp_path / "parts")
    state = epochs(first, values[:3]).state_dict()
    second = Checkpoint("score", "min", save_top_k=2, path=tmp_path / "parts")
    run = engine(second)
    run.load_state_dict(state)
    assert second.best_path is None  # nothing is read before the build
    for _ in run.train(tiny.loader(16), num_epochs=4):
        run.auto_update()
        if run.is_epoch_end:
            run.metrics["score"] = values[run.epoch]
    assert second.kept == whole.kept
    assert second.best_score == 0.5
    assert files(tmp_path / "parts") == files(tmp_path / "whole") == [4, 8]


def test_files_that_are_gone_are_no_longer_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = epochs(Checkpoint("score", "min", path=tmp_path), [1.0]).state_dict()
    (tmp_path / "checkpoint_step_2.pt").unlink()
    plugin = Checkpoint("score", "min", path=tmp_path)
    run = engine(plugin)
    run.load_state_dict(state)
    run.build()
    assert plugin.kept == {}
    assert "checkpoint_step_2.pt when this was saved; gone" in caplog.text


def test_a_failed_save_leaves_the_plugin_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Checkpoint("score", "min", save_last=True, path=tmp_path)
    run = epochs(plugin, [2.0])
    kept, last = dict(plugin.kept), plugin.last_path

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("orbit.core.checkpoint.sharded.save_checkpoint", full)
    with pytest.raises(OSError, match="no space"):
        for _ in run.train(tiny.loader(16)):
            run.auto_update()
            run.metrics["score"] = 1.0
    assert (plugin.kept, plugin.last_path) == (kept, last)
    assert files(tmp_path) == [2]


def test_a_metric_that_nobody_measures_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    run = engine(Checkpoint("val_los", path=tmp_path))
    with pytest.raises(MetricError, match="never saw 'val_los': .*did you mean 'val_loss'"):
        for _ in run.train(tiny.loader(), num_epochs=2):
            run.auto_update()
            if run.is_epoch_end:
                for _ in run.eval(tiny.loader(20)):
                    run.auto_update()
    assert run.epoch == 0
    with pytest.raises(MetricError, match="did you mean 'train_loss'"):
        epochs(Checkpoint("trian_loss", path=tmp_path), [1.0, 2.0])
    with pytest.raises(
        MetricError, match="never saw 'val_loss'"
    ):  # there might have been an evaluation later on
        epochs(Checkpoint("val_loss", path=tmp_path, save_last=True), [1.0, 2.0])
    assert files(tmp_path) == [4]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    for other in (CheckpointingHook(path=tmp_path / "x"), Checkpoint(path=tmp_path / "y" / ".." / "x")):
        with pytest.raises(ValueError, match=f"{type(other).__name__} writes into .* too"):
            epochs(Checkpoint(path=tmp_path / "x"), [1.0], other)
    epochs(
        Checkpoint(path=tmp_path / "x"),
        [1.0],
        CheckpointingHook(path=tmp_path),
        Checkpoint(path=tmp_path / "y"),
    )
    assert files(tmp_path) == files(tmp_path / "x") == files(tmp_path / "y") == [2]


def test_another_process_that_writes_there_is_refused(tmp_path: Path) -> None:
    """The lock is taken when training starts and given back at its end."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(WorkspaceLockedError, match=str(tmp_path)):
        epochs(Checkpoint(path=tmp_path), [1.0])
    lock.release()
    epochs(Checkpoint(path=tmp_path), [1.0])
    lock.acquire()
    lock.release()


@pytest.mark.parametrize(
    "options",
    [{"save_top_k": -2}, {"save_top_k": True}, {"save_top_k": 0}, {"mode": "up"}, {"every_n_train_steps": 0}],
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"Checkpoint\({next(iter(options))}="):
        Checkpoint("val_loss", **options)

"""W&B offline, for real: what its own process wrote is read back from the .wandb files."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")

from orbit.plugin import CheckpointingHook, Plugin
from orbit.trainer import WandbHook
from tests import tiny, tracked


@pytest.fixture(autouse=True)
def only_its_own_run() -> Iterator[None]:
    yield
    import wandb

    assert wandb.run is None, "the run is the hook's own"


def chunks(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if 32768 - at % 32768 < 7:  # a header does not cross blocks
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class Written:
    """What a run's folder under `<dir>/wandb` says."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.folder, self.rows, self.metrics = folder, list[dict[str, Any]](), dict[str, str]()
        self.config: dict[str, Any] = {}
        self.run: Any = None
        self.exit: int | None = None
        (path,) = folder.glob("run-*.wandb")
        for chunk in chunks(path):
            record = Record.FromString(chunk)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *parents, key = item.nested_key or [item.key]
                    place = row
                    for parent in parents:
                        place = place.setdefault(parent, {})
                    place[key] = json.loads(item.value_json)
                self.rows.append(row)
            elif kind == "run":
                self.run = record.run
                self.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "exit":
                self.exit = record.exit.exit_code

    def column(self, name: str) -> list[tuple[int, Any]]:
        return [(row["trainer/step"], row[name]) for row in self.rows if name in row]


def runs(folder: Path) -> list[Written]:
    """What W&B has written of every run, once it is done: its process goes on writing after `finish`."""
    folders = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    deadline = time.monotonic() + 30
    while True:
        found = [Written(path) for path in folders]
        if all(run.exit is not None for run in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("face", tracked.FACES)
def test_numbers_images_and_settings_are_there(
    face: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hook = WandbHook(
        "my-project", "first", {"lr": 0.1, "model": {"bias": True}}, interval=2, dir=str(tmp_path)
    )
    tracked.train(face, tmp_path / "own", [hook], steps=7)
    (run,) = runs(tmp_path)
    assert (run.run.project, run.run.display_name, run.run.run_id) == ("my-project", "first", hook.run_id)
    assert (run.config["lr"], run.config["model"]) == (0.1, {"bias": True})
    assert run.column("parts/ce") == [(step, step + 0.5) for step in range(7)]
    assert [step for step, _ in run.column("loss")] == [2, 4, 6]
    assert [step for step, _ in run.column("epoch/train_loss")] == [7]
    if face == "trainer":
        assert run.column("losses/twice") == [(s, pytest.approx(2 * v)) for s, v in run.column("losses/ce")]
    pictures = run.column("seen/x")
    assert [step for step, _ in pictures] == [0, 2, 4, 6]
    for _, picture in pictures:
        assert np.array_equal(np.asarray(Image.open(run.folder / "files" / picture["path"])), tracked.PICTURE)
    assert run.metrics == {"trainer/step": "", "*": "trainer/step"}
    assert run.exit == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("face", tracked.FACES)
def test_a_resumed_run_goes_on_in_the_same_run(face: str, tmp_path: Path) -> None:
    first = WandbHook("p", interval=3, dir=str(tmp_path))
    with pytest.raises(tracked.Killed):
        tracked.train(face, tmp_path / "own", [first], 8, dies_at=6)
    second = WandbHook("p", interval=3, dir=str(tmp_path))
    tracked.train(face, tmp_path / "own", [second], 8)
    assert second.run_id == first.run_id
    failed, resumed = runs(tmp_path)
    assert (failed.exit, resumed.exit) == (1, 0)
    assert failed.run.run_id == resumed.run.run_id == first.run_id
    assert failed.column("parts/ce")[-1] == (5, 5.5)
    assert resumed.column("parts/ce") == [(step, step + 0.5) for step in range(4, 8)]
    assert resumed.column("loss") == failed.column("loss")[1:], "the interval of steps 4 to 6 is whole"
    assert len(resumed.column("loss")) == 1


def test_what_the_user_gives_wins_and_the_workspace_keeps_it(tmp_path: Path) -> None:
    hook = WandbHook("p", tags=["x"], id="mine", notes="n")
    tiny.Trainer(2, [hook], workspace=tmp_path / "work").train()
    (run,) = runs(tmp_path / "work")
    assert (run.run.run_id, list(run.run.tags), run.run.notes) == ("mine", ["x"], "n")
    assert hook.run is None


def test_it_leaves_the_users_own_run_alone(tmp_path: Path) -> None:
    import wandb

    own = wandb.init(project="own", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    tiny.Trainer(2, [WandbHook("p", dir=str(tmp_path))]).train()
    own.log({"still": 1})
    own.finish()
    assert sorted(run.run.project for run in runs(tmp_path)) == ["own", "p"]


def test_a_checkpoint_of_a_run_without_the_hook_begins_one(tmp_path: Path) -> None:
    def hooks(*more: Plugin) -> list[Plugin]:
        return [*more, CheckpointingHook(2, path="c", exit_signals=[])]

    tiny.Trainer(2, hooks(), workspace=tmp_path).train()
    tiny.Trainer(4, hooks(WandbHook("p", interval=1)), workspace=tmp_path).train()
    (run,) = runs(tmp_path)
    assert [step for step, _ in run.column("loss")] == [3, 4]

"""trackio's local database, read back by trackio."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")

from trackio.sqlite_storage import SQLiteStorage

from orbit.plugin import TrackioHook
from tests import tracked


def column(rows: list[dict[str, Any]], name: str) -> list[tuple[int, Any]]:
    return [(row["step"], row[name]) for row in rows if name in row]


@pytest.mark.parametrize("face", tracked.FACES)
def test_numbers_images_and_settings_are_there(face: str, tmp_path: Path) -> None:
    hook = TrackioHook(f"mine-{face}", "first", {"lr": 0.1}, interval=2, embed=False)
    trainer = tracked.train(face, tmp_path, [hook], steps=7)
    rows = SQLiteStorage.get_logs(f"mine-{face}", "first")
    assert column(rows, "parts/ce") == [(step, step + 0.5) for step in range(7)]
    assert [step for step, _ in column(rows, "loss")] == [2, 4, 6]
    assert column(rows, "epoch/train_loss") == [(7, trainer.metrics["train_loss"])]
    if face == "trainer":
        twice, once = (column(rows, f"losses/{name}") for name in ("twice", "ce"))
        assert twice == [(step, pytest.approx(2 * value)) for step, value in once]
    pictures = column(rows, "seen/x")
    assert [step for step, _ in pictures] == [0, 2, 4, 6]
    path = Path(os.environ["TRACKIO_DIR"]) / "media" / pictures[0][1]["file_path"]
    assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), tracked.PICTURE)
    (config,) = SQLiteStorage.get_all_run_configs(f"mine-{face}").values()
    assert config["lr"] == 0.1


@pytest.mark.parametrize("face", tracked.FACES)
def test_a_resumed_run_goes_on_in_the_same_run(face: str, tmp_path: Path) -> None:
    def hook() -> TrackioHook:
        return TrackioHook(f"resumed-{face}", interval=3, embed=False)

    first, second = hook(), hook()
    with pytest.raises(tracked.Killed):
        tracked.train(face, tmp_path, [first], 8, dies_at=6)
    tracked.train(face, tmp_path, [second], 8)
    assert second.run_name == first.run_name
    assert SQLiteStorage.get_runs(f"resumed-{face}") == [first.run_name]
    losses = column(SQLiteStorage.get_logs(f"resumed-{face}", first.run_name), "loss")
    assert [step for step, _ in losses] == [3, 6, 6]
    assert losses[1] == losses[2], "the interval of steps 4 to 6 is whole"

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orbit.plugin import Board
from tests import tracked


def read(folder: Path) -> EventAccumulator:
    """The folder as TensorBoard shows it."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    found.Reload()
    return found


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What does not depend on the clock."""
    events = read(folder)
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.endswith("_time")
    }


@pytest.mark.parametrize("face", tracked.FACES)
def test_numbers_images_and_settings_are_there(face: str, tmp_path: Path) -> None:
    config = {"lr": 0.1, "model": {"name": "tiny", "sizes": [8, 3], "bias": True}}
    trainer = tracked.train(face, tmp_path, [Board(tmp_path / "board", interval=2, config=config)], steps=7)
    found = curves(tmp_path / "board")
    assert found["parts/ce"] == [(step, step + 0.5) for step in range(7)]
    assert found["parts/kl"] == [(step, step / 4) for step in range(7)]
    assert [step for step, _ in found["loss"]] == [2, 4, 6]
    assert found["epoch/train_loss"] == [(7, pytest.approx(trainer.metrics["train_loss"]))]
    if face == "trainer":
        assert found["losses/twice"] == [(s, pytest.approx(2 * v)) for s, v in found["losses/ce"]]
    events = read(tmp_path / "board")
    images = events.Images("seen/x")
    assert [image.step for image in images] == [0, 2, 4, 6]
    for image in images:
        assert np.array_equal(np.asarray(Image.open(BytesIO(image.encoded_image_string))), tracked.PICTURE)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model/sizes | [8, 3] |" in text
    session: dict[str, Any] = {}
    for tag in ("session_start_info", "session_end_info"):
        content = events.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        session[tag] = getattr(HParamsPluginData.FromString(content), tag)
    hparams = session["session_start_info"].hparams
    assert set(hparams) == {"lr", "model/name", "model/sizes", "model/bias"}
    assert hparams["lr"].number_value == 0.1
    assert session["session_end_info"].status


@pytest.mark.parametrize("face", tracked.FACES)
@pytest.mark.parametrize("interval", [2, 3])
def test_a_resumed_run_has_the_curves_of_an_uninterrupted_one(
    interval: int, face: str, tmp_path: Path
) -> None:
    tracked.train(face, tmp_path / "whole", [Board(tmp_path / "whole" / "board", interval)], 8)
    board = tmp_path / "cut" / "board"
    with pytest.raises(tracked.Killed):
        tracked.train(
            face, tmp_path / "cut", [Board(board, interval)], 8, dies_at=6
        )  # two steps that are saved nowhere
    lost = curves(board)
    assert lost["parts/ce"][-1] == (5, 5.5)
    time.sleep(1.1 - time.time() % 1)  # TensorBoard reads files by the second they were made in
    tracked.train(face, tmp_path / "cut", [Board(board, interval)], 8)
    assert curves(board) == curves(tmp_path / "whole" / "board")
    steps = [image.step for image in read(board).Images("seen/x")]
    assert sorted(set(steps)) == [0, 2, 4, 6]


def test_images_of_the_checkpoints_step_stay(tmp_path: Path) -> None:
    class Shows(tracked.Says):
        def on_before_step(self, trainer: Any) -> None:
            if trainer.step == self.dies_at:
                raise tracked.Killed

        def on_after_step(self, trainer: Any) -> None:  # before the checkpoint of this step
            trainer.log_images({"x": tracked.PICTURE})

    board = tmp_path / "board"
    with pytest.raises(tracked.Killed):
        tracked.train("engine", tmp_path, [Board(board, 1), Shows(dies_at=6)], 8)
    time.sleep(1.1 - time.time() % 1)
    tracked.train("engine", tmp_path, [Board(board, 1), Shows()], 8)
    assert [image.step for image in read(board).Images("x")] == list(range(1, 9))
    assert [step for step, _ in curves(board)["loss"]] == list(range(1, 9))


def test_what_was_written_before_a_checkpoint_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    board, write = Board(tmp_path / "board", 1), RecordWriter.write

    def slowly(self: Any, data: bytes) -> None:
        time.sleep(0.02)
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", slowly)  # a thread of TensorBoard's writes; it may lag behind

    class Looks(tracked.Says):
        priority = 1000
        seen: Any = None

        def on_after_step(self, trainer: Any) -> None:
            if trainer.step == 4:  # as a killed process leaves it: nothing was closed
                self.seen = curves(tmp_path / "board")

    looks = Looks()
    tracked.train("trainer", tmp_path, [board, looks], 5)
    assert [step for step, _ in looks.seen["loss"]] == [1, 2, 3, 4]


def test_a_run_that_begins_anew_hides_what_was_there(tmp_path: Path) -> None:
    tracked.train("engine", tmp_path / "a", [Board(tmp_path / "board", 1)], 5)
    time.sleep(1.1 - time.time() % 1)
    tracked.train("engine", tmp_path / "b", [Board(tmp_path / "board", 1)], 3)
    assert [step for step, _ in curves(tmp_path / "board")["loss"]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (Image.new("P", (3, 2)), "RGB"),
        (Image.new("LA", (3, 2)), "RGBA"),
        (Image.new("1", (3, 2)), "RGB"),
        (np.zeros((2, 3)), "RGB"),
        (np.zeros((2, 3, 4)), "RGBA"),
    ],
)
def test_every_kind_of_image_can_be_shown(image: Any, mode: str, tmp_path: Path) -> None:
    class Shows(tracked.Says):
        def on_before_step(self, trainer: Any) -> None:
            trainer.log_images({"x": image})

    tracked.train("engine", tmp_path, [Board(tmp_path / "board"), Shows()], 1)
    shown = Image.open(BytesIO(read(tmp_path / "board").Images("x")[0].encoded_image_string))
    assert (shown.mode, shown.size) == (mode, (3, 2))

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from orbit.trainer import ImageFileLoggerHook
from tests import tiny


def run(hook: ImageFileLoggerHook, images: dict[str, Any], steps: int = 4, **options: Any) -> None:
    class Trainer(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            result = super().forward(input)
            self.log_images(images)
            return result

    Trainer(steps, [hook], **options).train()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_every_kind_of_image_is_saved_at_multiples_of_the_interval(tmp_path: Path) -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    colour = np.stack([grey, grey // 2, grey // 4], -1)
    images = {
        "pil": Image.fromarray(colour),
        "bytes": grey,
        "nested": {"colour": colour, "one": grey[..., None]},
        "floats": torch.from_numpy(colour).permute(2, 0, 1) / 255,
        "half": (torch.from_numpy(grey) / 255).to(torch.bfloat16),
        "beyond": np.array([[-1.0, 0.5, 2.0, np.nan]]),
    }
    run(ImageFileLoggerHook(2), images, workspace=tmp_path)
    names = ["beyond", "bytes", "floats", "half", "nested/colour", "nested/one", "pil"]
    assert files(tmp_path / "images") == [f"step_{step}/{name}.png" for step in (0, 2) for name in names]
    read = {name: np.asarray(Image.open(tmp_path / f"images/step_2/{name}.png")) for name in names}
    for name in ("pil", "nested/colour", "floats"):
        assert np.array_equal(read[name], colour)
    for name in ("bytes", "nested/one"):
        assert np.array_equal(read[name], grey)
    assert abs(read["half"].astype(int) - grey).max() <= 1
    assert read["beyond"].tolist() == [[0, 128, 255, 0]]


def test_what_is_left_out_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = np.zeros((2, 2), np.uint8)
    run(ImageFileLoggerHook(1, tmp_path / "own", max_images=2), {str(k): image for k in range(5)})
    assert files(tmp_path / "own") == [f"step_{step}/{k}.png" for step in range(4) for k in range(2)]
    said = [record.getMessage() for record in caplog.records if "images" in record.getMessage()]
    assert said == ["5 images were logged at step 0 and ImageFileLoggerHook saves the first 2 of a call"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"../../out": np.zeros((2, 2))}, "'../../out': its name leads out of"),
        ({"a": {"b": "text"}}, "'a/b' is a str; log a PIL image"),
        ({"a": torch.zeros(3, 2, 4, 4)}, r"'a' is a ndarray \(3, 2, 4, 4\)"),
        ({"a": torch.zeros(7, 4, 4)}, r"'a' is a ndarray \(4, 4, 7\)"),
    ],
)
def test_what_is_no_image_is_refused_and_nothing_written(
    images: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(ImageFileLoggerHook(1, tmp_path / "x/y"), {"fine": np.zeros((2, 2)), **images})
    assert files(tmp_path) == []


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"max_images": 0}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ImageFileLoggerHook\("):
        ImageFileLoggerHook(**arguments)

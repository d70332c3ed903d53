"""The example of images, at tiny scale on files of the published layouts."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.data.images import published

EXAMPLE = Path(__file__).parents[2] / "examples/04_images.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("images_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_and_looks_at_the_test_images_once(tmp_path: Path, example: ModuleType, capsys) -> None:
    published.fashion_mnist(tmp_path, 600, 40)
    accuracy = example.main(tmp_path, epochs=3, width=8)
    printed = capsys.readouterr().out
    assert accuracy >= 0.9
    assert printed.count("epoch ") == 3
    assert f"test accuracy {accuracy:.2%}" in printed


def test_the_test_images_choose_nothing(tmp_path: Path, example: ModuleType, capsys) -> None:
    """With test labels that nothing can know, training goes as before, and the accuracy says so."""
    published.fashion_mnist(tmp_path, 600, 40)
    wrong = torch.full((40,), 9, dtype=torch.uint8)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(published.idx(wrong.numpy()))  # found before the .gz
    assert example.main(tmp_path, epochs=3, width=8) < 0.3
    assert float(capsys.readouterr().out.split("val_acc ")[-1].split()[0]) >= 0.9


def test_cifar_s_layout_is_trained_on_too(tmp_path: Path, example: ModuleType) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
        (folder / f"{name}.bin").write_bytes(published.cifar_binary(pixels, [i % 10 for i in range(20)]))
    assert 0 <= example.main(tmp_path, cifar=True, epochs=1, width=4) <= 1


def test_missing_data_is_told_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, message in (
        ([tmp_path], 1, "apt-get install dataset-fashion-mnist"),
        (["--data", "cifar", tmp_path], 1, "get cifar-10-python.tar.gz"),
        (["--data", "cifar"], 2, "--data cifar needs the folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["04_images.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        assert ended.value.code == code
        assert message in capsys.readouterr().err

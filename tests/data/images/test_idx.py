"""The reader of idx files, and of Fashion-MNIST in them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from orbit.data.images import ImageDataError, load_fashion_mnist, read_idx
from orbit.data.images.idx import DEBIAN
from tests.data.images import published


@pytest.mark.parametrize("kind", published.TYPES)
@pytest.mark.parametrize("zipped", [False, True])
def test_numbers_of_every_type_are_read_back(tmp_path: Path, kind: str, zipped: bool) -> None:
    array = (np.random.default_rng(0).normal(size=(3, 4, 5)) * 50).astype(kind)
    path = tmp_path / "numbers"  # what it is called does not count
    content = published.idx(array)
    path.write_bytes(gzip.compress(content) if zipped else content)
    found = read_idx(path)
    assert found.dtype is torch.from_numpy(array).dtype
    assert np.array_equal(found.numpy(), array)


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist(tmp_path: Path, zipped: bool) -> None:
    made = published.fashion_mnist(tmp_path, 20, 10, zipped)
    for train, part in ((True, "train"), (False, "t10k")):
        images = load_fashion_mnist(tmp_path, train)
        pixels, labels = made[part]
        assert torch.equal(images.pixels, pixels[:, None])
        assert torch.equal(images.labels, labels)
        assert images.classes[images.labels[9]] == "Ankle boot"


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_real_one() -> None:
    images = load_fashion_mnist(train=False)
    assert images.pixels.shape == (10_000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [1000] * 10
    assert images.labels[:5].tolist() == [9, 2, 1, 1, 6]
    assert images.statistics()[0].item() == pytest.approx(0.2868, abs=1e-4)


def test_missing_files_say_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing: apt-get install"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is no idx file: it begins with nothing"),
        (lambda content: b"P5 28 28" + content, "is no idx file: it begins with 50 35 20 32"),
        (lambda content: content[:-1], "says that it holds .* numbers and has less"),
        (lambda content: content + b"\0", "says that it holds .* numbers and has more"),
        (lambda content: content[:6], "numbers and has less"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "4294967295.* has less"),
        (lambda content: gzip.compress(content[:4] + b"\xff" * 12 + content[16:]), "4294967295.* has less"),
        (lambda content: gzip.compress(content)[:-20], "is damaged: .*; fetch it again"),
        (lambda content: gzip.compress(content)[:30] + b"\xff" * 40, "is damaged: "),
        (lambda content: published.idx(np.zeros((20, 28, 28), "f4")), "holds torch.float32 of 3 dimensions"),
        (lambda content: published.idx(np.zeros((20, 784), "u1")), "holds torch.uint8 of 2 dimensions"),
        (lambda content: published.idx(np.zeros((19, 28, 28), "u1")), "has 20 labels and .* has 19 images"),
    ],
)
def test_damaged_images_are_told_by_name(tmp_path: Path, damage, message: str) -> None:
    published.fashion_mnist(tmp_path, 20, 10, zipped=False)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageDataError, match=f"(?s)train-images-idx3-ubyte.*{message}|{message}"):
        load_fashion_mnist(tmp_path)
    assert len(load_fashion_mnist(tmp_path, train=False)) == 10


def test_a_label_that_nothing_is_called(tmp_path: Path) -> None:
    published.fashion_mnist(tmp_path, 20, 10, zipped=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(published.idx(np.full(10, 10, "u1")))
    with pytest.raises(ImageDataError, match="t10k-labels-idx1-ubyte: label 10 is none of 0 ... 9"):
        load_fashion_mnist(tmp_path, train=False)

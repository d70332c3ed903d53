"""The reader of CIFAR-10, in the two layouts that it is published in."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orbit.data.images import ImageDataError, load_cifar10
from tests.data.images import published

COUNT = 12


def numbers(seed: int) -> tuple[Tensor, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (COUNT, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(10, (COUNT,), generator=generator).tolist()


def write(folder: Path, layout: str) -> Path:
    folder = folder / f"cifar-10-batches-{layout}"
    folder.mkdir()
    for seed, name in enumerate(["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]):
        if layout == "py":
            (folder / name).write_bytes(published.cifar_pickle(*numbers(seed)))
        else:
            (folder / f"{name}.bin").write_bytes(published.cifar_binary(*numbers(seed)))
    return folder


@pytest.mark.parametrize("layout", ["py", "bin"])
@pytest.mark.parametrize("inside", [False, True])
def test_both_layouts_hold_the_same_images(tmp_path: Path, layout: str, inside: bool) -> None:
    folder = write(tmp_path, layout)
    test = load_cifar10(folder if inside else tmp_path, train=False)
    train = load_cifar10(folder if inside else tmp_path)
    for found, seeds in ((test, [0]), (train, [1, 2, 3, 4, 5])):
        assert torch.equal(found.pixels, torch.cat([numbers(seed)[0] for seed in seeds]))
        assert found.pixels.dtype is torch.uint8
        assert found.labels.tolist() == [label for seed in seeds for label in numbers(seed)[1]]
        assert found.labels.dtype is torch.int64
        assert found.classes[3] == "cat"


def test_the_pickle_is_one_that_numpy_reads(tmp_path: Path) -> None:
    """So the fixture is what it says: Python's own reader makes the array of it."""
    pixels, labels = numbers(0)
    batch = pickle.loads(published.cifar_pickle(pixels, labels), encoding="bytes")
    assert batch[b"labels"] == labels
    assert (batch[b"data"] == pixels.flatten(1).numpy()).all()


def test_missing_batches(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has no data_batch_1 and no data_batch_1.bin.*get cifar-10-python"
    ):
        load_cifar10(tmp_path)
    folder = write(tmp_path, "bin")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data_batch_4.bin is missing, and .* has others; unpack again"
    ):
        load_cifar10(tmp_path)
    assert len(load_cifar10(tmp_path, train=False)) == COUNT


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "has 36875 bytes, no multiple of an image's 3073"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: b"\x0a" + content[1:], "label 10 is none of 0 ... 9"),
    ],
)
def test_damaged_binaries_are_told_by_name(tmp_path: Path, damage, message: str) -> None:
    path = write(tmp_path, "bin") / "test_batch.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageDataError, match=rf"test_batch\.bin.* {message}"):
        load_cifar10(tmp_path, train=False)


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return Path.touch, (self.path,)


def batch_with(pixels: Tensor, labels: list[int], old: bytes, new: bytes) -> bytes:
    content = published.cifar_pickle(pixels, labels)
    assert content.count(old) == 1
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": b"", b"labels": []}), 'has no array "data" and list "labels"'),
        (pickle.dumps([1, 2]), 'has no array "data" and list "labels"'),
        (pickle.dumps({b"data": numbers(0)[0].numpy(), b"labels": [1]}), "it asks for numpy"),
        (published.cifar_pickle(*numbers(0))[:-9], "is damaged"),
        (published.cifar_pickle(numbers(0)[0][:5], numbers(0)[1]), "has 12 labels and .* has 5 images"),
        (published.cifar_pickle(numbers(0)[0], [10] * COUNT), '"labels" are not all numbers in 0 ... 9'),
        (batch_with(*numbers(0), b"U\x02u1", b"U\x02i2"), '"data" is no uint8 array'),
        (batch_with(*numbers(0), b"tb\x89T", b"tb\x88T"), '"data" is no uint8 array'),  # columns first
        (batch_with(*numbers(0), b"J\x00\x0c\x00\x00", b"J\xff\x0b\x00\x00"), '"data" is no uint8 array'),
        (batch_with(*numbers(0), b"q\x05", b"r\xff\xff\xff\xff"), "it asks for more memory than it can need"),
        (b"\x80\x02cos\nsystem\nU\x04true\x85R.", "it asks for os.system"),
        (b"", "is damaged"),
    ],
)
def test_damaged_pickles_are_told_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, "py") / "test_batch"
    path.write_bytes(content)
    with pytest.raises(ImageDataError, match=rf"test_batch.*{message}"):
        load_cifar10(tmp_path, train=False)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    path, touched = write(tmp_path, "py") / "test_batch", tmp_path / "touched"
    path.write_bytes(pickle.dumps({b"data": Touch(touched), b"labels": []}))
    with pytest.raises(ImageDataError, match="it asks for pathlib"):
        load_cifar10(tmp_path, train=False)
    assert not touched.exists()
    pickle.loads(path.read_bytes())
    assert touched.exists(), "the trap was armed"


def test_broken_bytes_raise_the_one_error_or_change_only_values(tmp_path: Path) -> None:
    path = write(tmp_path, "py") / "test_batch"
    whole = bytearray(path.read_bytes())
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        broken = bytearray(whole)
        where = rng.choice([rng.randrange(400), rng.randrange(len(whole) - 600, len(whole))])
        broken[where] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            assert load_cifar10(tmp_path, train=False).pixels.shape == (COUNT, 3, 32, 32)
        except ImageDataError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in message for message in messages)

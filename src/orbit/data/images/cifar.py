"""CIFAR-10 in both layouts that it is published in, https://www.cs.toronto.edu/~kriz/cifar.html.

    cifar-10-batches-bin/    data_batch_1.bin ... data_batch_5.bin, test_batch.bin
                             records of 1 + 3072 bytes: label, then red, green and blue, 32 rows each
    cifar-10-batches-py/     data_batch_1 ... data_batch_5, test_batch
                             a pickle of Python 2: {"data": uint8 array (N, 3072), "labels": list, ...}

A pickle is a program. These are run without NumPy, with a blank for each of the three names that they need; one that
asks for any other name is refused. The pixels are then taken out of the blanks.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orbit.data.images.labelled import ImageDataError, LabelledImages, labelled

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32


def load_cifar10(folder: str | Path, train: bool = True) -> LabelledImages:
    """CIFAR-10's 50,000 training or 10,000 test images, uint8 (N, 3, 32, 32).

    Args:
        folder: one of the folders above, or the one that it was unpacked into.
        train: the training images, or the test images.

    Raises:
        FileNotFoundError: a batch is missing; says which, and where to get it.
        ImageDataError: a file is damaged or asks for code.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    files = _find(Path(folder), names)
    parts = [_read_binary(path) if path.suffix == ".bin" else _read_pickle(path) for path in files]
    return LabelledImages(
        torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]), CLASSES
    )


def _find(folder: Path, names: list[str]) -> list[Path]:
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for ending in ("", ".bin"):
            files = [place / f"{name}{ending}" for name in names]
            missing = [path for path in files if not path.is_file()]
            if missing and len(missing) < len(files):
                raise FileNotFoundError(
                    f"{missing[0]} is missing, and {files[0].parent} has others; unpack again"
                )
            if not missing:
                return files
    raise FileNotFoundError(
        f"{folder} has no {names[0]} and no {names[0]}.bin, nor have cifar-10-batches-py and cifar-10-batches-bin "
        "in it: get cifar-10-python.tar.gz or cifar-10-binary.tar.gz from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and unpack it"
    )


def _read_binary(path: Path) -> LabelledImages:
    content = path.read_bytes()
    if not content or len(content) % (1 + _PIXELS):
        raise ImageDataError(
            f"{path} has {len(content)} bytes, no multiple of an image's {1 + _PIXELS}; unpack it again"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 1 + _PIXELS)
    return _images(path, records[:, 1:], records[:, 0])


def _read_pickle(path: Path) -> LabelledImages:
    batch = _unpickle(path)
    pixels = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    if not isinstance(pixels, _Blank) or not isinstance(labels, list):
        raise ImageDataError(f'{path} has no array "data" and list "labels": it is no batch of CIFAR-10')
    match pixels.state:
        case (_, (int(n), width), _Blank(args=(b"u1", *_)), False, bytes(raw)) if (
            width == _PIXELS and len(raw) == n * width > 0
        ):
            numbers = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(n, width)
        case _:
            raise ImageDataError(f'{path}: "data" is no uint8 array of shape (N, {_PIXELS})')
    if not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise ImageDataError(f'{path}: "labels" are not all numbers in 0 ... {len(CLASSES) - 1}')
    return _images(path, numbers, torch.tensor(labels, dtype=torch.int64))


def _images(path: Path, pixels: Tensor, labels: Tensor) -> LabelledImages:
    return labelled(pixels.reshape(-1, 3, 32, 32), labels, CLASSES, path, path)


class _Blank:
    """Stands for `ndarray`, `dtype` and what makes an array: keeps what it is given."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            return _Blank
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path) -> Any:
    content = path.read_bytes()
    try:
        for opcode, number, _ in pickletools.genops(content):
            if opcode.name in ("PUT", "LONG_BINPUT") and int(number or 0) > len(content):
                raise pickle.UnpicklingError("it asks for more memory than it can need")
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise ImageDataError(f"{path} is no batch of CIFAR-10, or is damaged: {error}") from error

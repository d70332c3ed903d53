"""The idx format of MNIST and its successors, plain or gzipped.

    0  0  type  n          type: 8 uint8, 9 int8, 11 int16, 12 int32, 13 float32, 14 float64
    size₁ … sizeₙ          uint32
    the numbers            the last dimension fastest; everything big-endian

http://yann.lecun.com/exdb/mnist/ describes it; Fashion-MNIST is Xiao et al. 2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from orbit.data.images.labelled import ImageDataError, LabelledImages, labelled

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_TYPES = {8: "u1", 9: "i1", 11: "i2", 12: "i4", 13: "f4", 14: "f8"}
_GZIP = b"\x1f\x8b"
_MOST_DEFLATED = 1032  # bytes that one byte of a gzip file can stand for


def load_fashion_mnist(folder: str | Path = DEBIAN, train: bool = True) -> LabelledImages:
    """Fashion-MNIST's 60,000 training or 10,000 test images, uint8 (N, 1, 28, 28).

    Args:
        folder: where its idx files are, gzipped or not, under their published names.
        train: the training images, or the test images.

    Raises:
        FileNotFoundError: there are no such files; says where to get them.
        ImageDataError: a file is damaged, or they do not belong together.
    """
    part = "train" if train else "t10k"
    pixel_file = _find(Path(folder), f"{part}-images-idx3-ubyte")
    label_file = _find(Path(folder), f"{part}-labels-idx1-ubyte")
    pixels, labels = read_idx(pixel_file), read_idx(label_file)
    for file, numbers, dim in ((pixel_file, pixels, 3), (label_file, labels, 1)):
        if numbers.dtype != torch.uint8 or numbers.dim() != dim:
            raise ImageDataError(
                f"{file} holds {numbers.dtype} of {numbers.dim()} dimensions: uint8 of {dim} is right"
            )
    return labelled(pixels[:, None], labels, CLASSES, pixel_file, label_file)


def read_idx(path: str | Path) -> Tensor:
    """The numbers of an idx file, in its shape and type.

    Raises:
        FileNotFoundError: there is no such file.
        ImageDataError: it is damaged, or no idx file.
    """
    path = Path(path)
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == _GZIP
        if zipped:
            with gzip.open(path) as file:
                return _read(path, file, path.stat().st_size * _MOST_DEFLATED)  # type: ignore[arg-type]
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ImageDataError(f"{path} is damaged: {error}; fetch it again") from error


def _read(path: Path, file: BinaryIO, most: int) -> Tensor:
    start = file.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _TYPES:
        raise ImageDataError(f"{path} is no idx file: it begins with {start.hex(' ') or 'nothing'}")
    sizes = file.read(4 * start[3])
    shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
    numbers = np.dtype(">" + _TYPES[start[2]])
    wanted = math.prod(shape) * numbers.itemsize
    content = file.read(wanted + 1) if wanted <= most else b""
    if len(shape) != start[3] or len(content) != wanted:
        has = "more" if len(content) > wanted else "less"
        raise ImageDataError(f"{path} says that it holds {shape} numbers and has {has}; fetch it again")
    array = np.frombuffer(bytearray(content), numbers).reshape(shape)
    return torch.from_numpy(array.astype(numbers.newbyteorder("="), copy=False))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder / name}.gz is missing: apt-get install dataset-fashion-mnist puts it into {DEBIAN}, and "
        "https://github.com/zalandoresearch/fashion-mnist has it for everyone"
    )

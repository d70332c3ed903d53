"""Writers of the published formats, so that the readers are tested on files of exactly their layout."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TYPES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}


def idx(array: np.ndarray) -> bytes:
    kind = TYPES[array.dtype.str[1:]]
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def fashion_mnist(
    folder: Path, train: int, test: int, zipped: bool = True
) -> dict[str, tuple[Tensor, Tensor]]:
    """Images of noise whose class is where they are bright, in Fashion-MNIST's four files."""
    made = {}
    for part, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count) % 10
        pixels = torch.randint(0, 60, (count, 28, 28), dtype=torch.uint8)
        for image, label in zip(pixels, labels.tolist(), strict=True):
            row, column = divmod(label, 4)
            image[9 * row : 9 * row + 9, 7 * column : 7 * column + 7] += 180
        for name, numbers in (("images-idx3", pixels), ("labels-idx1", labels.byte())):
            content = idx(numbers.numpy())
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content, 1) if zipped else content)
        made[part] = (pixels, labels)
    return made


def cifar_binary(pixels: Tensor, labels: Sequence[int]) -> bytes:
    return b"".join(
        bytes([label]) + image.numpy().tobytes() for image, label in zip(pixels, labels, strict=True)
    )


def cifar_pickle(pixels: Tensor, labels: Sequence[int]) -> bytes:
    """A batch as Python 2's cPickle wrote it, in protocol 2: strings are bytes, arrays are NumPy's of then."""
    raw = pixels.numpy().tobytes()
    shape = integer(len(pixels)) + integer(3072) + b"\x86"  # TUPLE2
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01"  # GLOBAL, BINPUT
        b"cnumpy\nndarray\nq\x02" + integer(0) + b"\x85" + text(b"b") + b"\x87Rq\x03("  # TUPLE3, REDUCE, MARK
        + integer(1) + shape
        + b"cnumpy\ndtype\nq\x04" + text(b"u1") + integer(0) + integer(1) + b"\x87Rq\x05("
        + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"  # TUPLE, BUILD
        + b"\x89" + text(raw) + b"tb"
    )  # fmt: skip
    items = {
        b"batch_label": text(b"training batch 1 of 5"),
        b"labels": b"](" + b"".join(map(integer, labels)) + b"e",
        b"data": array,
        b"filenames": b"](" + b"".join(text(b"leaf_s_%06d.png" % i) for i in range(len(labels))) + b"e",
    }
    return b"\x80\x02}q\x00(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


def text(value: bytes) -> bytes:
    return (
        b"U" + bytes([len(value)]) + value
        if len(value) < 256
        else b"T" + struct.pack("<i", len(value)) + value
    )


def integer(value: int) -> bytes:
    return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)

"""Samples that are made once and then read from the disk: `tokenised(dataset, key, folder)`.

    folder/<key>/meta.json  0.bin  0.offsets.bin  1.bin ...      one file a tensor of the samples, memory-mapped

The key is a hash of all that the samples are made of (`fingerprint.py`), so nothing old is ever read for something new.
A folder appears complete or not at all: it is written aside and renamed. Of several processes that want the same one, one
writes and the others wait. Every file is verified when it is opened, and a damaged folder is written again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from orbit.core.files import aside, remove, sha256_of, strays, sync_file, sync_folder, write_synced
from orbit.data.rows import DataError

_logger = logging.getLogger(__name__)
_META = "meta.json"
_STORED = {torch.int64: np.dtype("<i4")}  # token ids fit; other types are stored as they are


class Tokenised(Dataset[dict[str, Any]]):
    """The samples in a folder that `tokenised` wrote; each is equal to what the dataset gave.

    Raises:
        DataError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            meta = json.loads((folder / _META).read_text("utf-8"))
            for name, wanted in meta["files"].items():
                if sha256_of(folder / name) != wanted:
                    raise DataError(f"{folder / name} is damaged")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} is damaged: {error}") from error
        self.count: int = meta["count"]
        self._open(meta)

    def _open(self, meta: Mapping[str, Any]) -> None:
        self._values: list[tuple[list[str], list[Any]]] = [(c["path"], c["values"]) for c in meta["values"]]
        self._tensors: list[tuple[list[str], torch.dtype, NDArray[Any], NDArray[np.int64]]] = []
        for number, column in enumerate(meta["tensors"]):
            dtype: torch.dtype = getattr(torch, column["dtype"])
            offsets = np.fromfile(self.folder / f"{number}.offsets.bin", np.dtype("<i8"))
            flat = _mapped(self.folder / f"{number}.bin", _numpy_type(dtype))
            self._tensors.append((column["path"], dtype, flat, offsets))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = range(self.count)[index]
        sample: dict[str, Any] = {}
        for path, dtype, flat, offsets in self._tensors:
            part = np.array(flat[offsets[place] : offsets[place + 1]])
            _put(sample, path, torch.from_numpy(part).to(dtype))
        for path, values in self._values:
            _put(sample, path, values[place])
        return sample

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Of each sample the length of its first tensor, (samples,)."""
        return np.diff(self._tensors[0][3])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "count": self.count}  # a worker maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(json.loads((self.folder / _META).read_text("utf-8")))


def tokenised(dataset: Any, key: str, folder: Path) -> Tokenised:
    """The samples of `dataset`, from `folder/key` if they lie there, else made now and written.

    Args:
        dataset: sized and indexed; its samples are mappings (also nested) of 1-D tensors and plain values, the same keys
            in each, and depend on nothing that `key` does not tell.
        key: a hash of what the samples are made of.
        folder: of all caches.

    Raises:
        DataError: samples of another form, or a folder that cannot be written. Whatever the dataset raises.
    """
    target = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{key}.lock"):
            if target.exists():
                try:
                    return Tokenised(target)
                except DataError as error:
                    _logger.warning("%s; making it again", error)
                    remove(target)
            for stray in strays(folder):
                remove(stray)
            with aside(target) as partial:
                partial.mkdir()
                _write(dataset, partial)
                os.replace(partial, target)
            sync_folder(folder)
            return Tokenised(target)
    except OSError as error:
        raise DataError(
            f"making {target} failed: {error.strerror or error}; set ORBIT_CACHE to a folder that can be written"
        ) from error


def _write(dataset: Any, folder: Path) -> None:
    first = dict(_leaves(dataset[0], ()))
    tensors = [path for path, value in first.items() if isinstance(value, Tensor)]
    values: dict[tuple[str, ...], list[Any]] = {path: [] for path in first if path not in tensors}
    ends: dict[tuple[str, ...], list[int]] = {path: [0] for path in tensors}
    names = [f"{number}.bin" for number in range(len(tensors))]
    if not tensors:
        raise DataError(f"samples without a tensor cannot be cached: sample 0 has {sorted(dataset[0])}")
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in names]
        for index in range(len(dataset)):
            sample = dict(_leaves(dataset[index], ()))
            if sample.keys() != first.keys():
                raise DataError(f"sample {index} has {_shown(sample)} and sample 0 {_shown(first)}")
            for path, file in zip(tensors, files, strict=True):
                file.write(_bytes(sample[path], first[path].dtype, f"sample {index}, {'.'.join(path)}"))
                ends[path].append(ends[path][-1] + len(sample[path]))
            for path, column in values.items():
                column.append(_plain(sample[path], f"sample {index}, {'.'.join(path)}"))
    for name, path in zip(names, tensors, strict=True):
        np.array(ends[path], np.dtype("<i8")).tofile(folder / name.replace(".bin", ".offsets.bin"))
    files_of = sorted(path.name for path in folder.iterdir())
    for name in files_of:
        sync_file(folder / name)
    meta = {
        "count": len(dataset),
        "tensors": [{"path": p, "dtype": str(first[p].dtype).removeprefix("torch.")} for p in tensors],
        "values": [{"path": path, "values": column} for path, column in values.items()],
        "files": {name: sha256_of(folder / name) for name in files_of},
    }
    write_synced(folder / _META, json.dumps(meta).encode())


def _leaves(sample: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in sample.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _put(sample: dict[str, Any], path: list[str], value: Any) -> None:
    for step in path[:-1]:
        sample = sample.setdefault(step, {})
    sample[path[-1]] = value


def _bytes(tensor: Any, dtype: torch.dtype, where: str) -> bytes:
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype != dtype:
        raise DataError(f"{where} is {tensor!r}: a 1-D tensor of {dtype} is needed, as in sample 0")
    array = tensor.numpy()
    stored = array.astype(_numpy_type(dtype))
    if dtype in _STORED and not np.array_equal(stored, array):
        raise DataError(f"{where} holds numbers beyond 32 bits")
    return stored.tobytes()


def _plain(value: Any, where: str) -> Any:
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise DataError(f"{where} is {value!r}: samples hold 1-D tensors, text, numbers, booleans and None")
    return value


def _shown(leaves: Mapping[tuple[str, ...], Any]) -> list[str]:
    return sorted(".".join(path) for path in leaves)


def _numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return _STORED.get(dtype) or torch.empty(0, dtype=dtype).numpy().dtype


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # which mmap refuses
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One at a time, of all processes and threads; a process that dies lets go."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

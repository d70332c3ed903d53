"""What a mixture remembers of its predictions: the latest one, and a log of all where asked; and that log on disk.

    <path>.npy              (num_logged, batch, seq, layers, experts), where all have one shape

    <path>-<seq>.npy        else one for each sequence length; of one with several shapes <path>-<seq>-0.npy, -1, …
    <path>-mapping.json     {file: [places of its tensors in the log, …], …}

as the public implementation names them. numpy has no bfloat16: it is written as float32, which holds every value of
it, and its file's entry in the mapping is then {"indices": [...], "dtype": "bfloat16"}.
"""

from __future__ import annotations

import io
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orbit.adapter.files import replace_files
from orbit.xlora.errors import XLoRAError

_NATIVE = (torch.float16, torch.float32, torch.float64)
_READ = ("float16", "float32", "float64")  # as numpy calls them, in this machine's order of bytes
_WIDENED = {"bfloat16": torch.bfloat16}


class ScalingsLog:
    """Predictions (batch, seq, layers, experts), detached.

    Attributes:
        latest: of the last forward, or None.
        entries: of every forward since logging began.
        enabled: is every forward logged?
        to_print: how many more are printed.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self.entries: list[Tensor] = []
        self.enabled = False
        self.to_print = 0

    def note(self, prediction: Tensor) -> None:
        """A forward has predicted this."""
        self.latest = prediction.detach()
        if self.enabled:
            self.entries.append(self.latest)
        if self.to_print:
            self.to_print -= 1
            print(f"scalings {tuple(prediction.shape)}: {self.latest}")


def save_scalings_log(path: str | os.PathLike[str], entries: Sequence[Tensor]) -> None:
    """Write a log, in the place of one that an earlier call wrote to the same path.

    Args:
        path: of the files, without an extension; folders on the way are made.
        entries: predictions (batch, seq, layers, experts).

    Raises:
        XLoRAError: the log is empty, the path has an extension, or a file is another log's; nothing is written.
    """
    path = Path(path)
    if path.suffix:
        raise XLoRAError(
            f"{str(path)!r} has the extension {path.suffix!r}, and .npy or -<seq>.npy is added to a path without one: "
            f"pass {str(path.with_suffix(''))!r}"
        )
    if path.name in ("", ".."):
        raise XLoRAError(
            f"{str(path)!r} is a folder: pass the path of the files in it, as {str(path / 'log')!r}"
        )
    if not entries:
        raise XLoRAError(
            "there are no scalings to write: call enable_scalings_logging() and run the model before"
        )
    places: dict[tuple[torch.Size, torch.dtype], list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        places[entry.shape, entry.dtype].append(place)
    lengths = [shape[1] for shape, _ in places]
    files: list[tuple[str, bytes]] = []
    mapping: dict[str, Any] = {}
    for shape, dtype in places:
        name = path.name
        if len(places) > 1:
            nth = sum(file.startswith(f"{path.name}-{shape[1]}-") for file in mapping)
            name += f"-{shape[1]}" if lengths.count(shape[1]) == 1 else f"-{shape[1]}-{nth}"
        indices = places[shape, dtype]
        files.append((f"{name}.npy", _as_npy([entries[place] for place in indices])))
        native = dtype in _NATIVE
        mapping[f"{name}.npy"] = (
            indices if native else {"indices": indices, "dtype": str(dtype).removeprefix("torch.")}
        )
    listed = len(places) > 1 or any(isinstance(entry, dict) for entry in mapping.values())
    if listed:
        files.append((_mapping_of(path).name, json.dumps(mapping, indent=2).encode()))
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _written_before(path)
    _refuse_to_share(path, [path.with_name(name) for name, _ in files], before)
    replace_files(path.parent, files)
    for stale in before:
        if stale.name not in dict(files):
            stale.unlink()


def load_scalings_log(path: str | os.PathLike[str], verbose: bool = False) -> list[Tensor]:
    """Read what `flush_log_scalings(path)` wrote, in the order of the log, also by the public implementation.

    Args:
        path: as it was given to `flush_log_scalings`, or with `.npy`.
        verbose: print every file that is read.

    Returns:
        The predictions (batch, seq, layers, experts).

    Raises:
        XLoRAError: a file is absent, unreadable, or does not fit the mapping.
    """
    path = Path(path)
    path = path.with_suffix("") if path.suffix == ".npy" else path
    if path.name in ("", ".."):
        raise XLoRAError(f"{str(path)!r} is a folder: give the path as flush_log_scalings had it")
    listing = _mapping_of(path)
    if not listing.is_file():
        return list(_from_npy(path.with_name(f"{path.name}.npy"), verbose))
    try:
        mapping = json.loads(listing.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise XLoRAError(f"{listing} is not JSON: {error}") from None
    found: dict[int, Tensor] = {}
    places: list[int] = []
    for name, entry in _files_in(listing, mapping).items():
        indices, dtype = (entry["indices"], entry["dtype"]) if isinstance(entry, dict) else (entry, None)
        file = path.with_name(name)
        tensors = _from_npy(file, verbose)
        if len(tensors) != len(indices):
            raise XLoRAError(f"{file} holds {len(tensors)} scalings, and {listing} says {len(indices)}")
        if dtype is not None:
            tensors = tensors.to(_WIDENED[dtype])
        found.update(zip(indices, tensors, strict=True))
        places += indices
    if sorted(places) != list(range(len(places))):
        raise XLoRAError(
            f"{listing} must have every place in the log once, from 0 on, and has {sorted(places)}"
        )
    return [found[place] for place in sorted(found)]


def _mapping_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-mapping.json")


def _files_in(listing: Path, mapping: Any) -> dict[str, Any]:
    """The mapping by the files' names, which lie beside it: the public implementation writes paths."""

    def fits(entry: Any) -> bool:
        if isinstance(entry, dict):
            return entry.get("dtype") in _WIDENED and fits(entry.get("indices"))
        return isinstance(entry, list) and all(isinstance(place, int) for place in entry)

    if not isinstance(mapping, dict) or not mapping or not all(map(fits, mapping.values())):
        raise XLoRAError(f"{listing} must map files to the places of their tensors in the log")
    return {Path(file).name: entry for file, entry in mapping.items()}


def _written_before(path: Path) -> list[Path]:
    """The files of a log at this path, the mapping first: without it the others mean nothing."""
    listing = _mapping_of(path)
    named: list[str] = []
    if listing.is_file():
        try:
            named = list(_files_in(listing, json.loads(listing.read_text("utf-8"))))
        except (ValueError, RecursionError) as error:  # XLoRAError is one
            raise XLoRAError(f"{listing} is in the way: it is of no log ({error}); delete it") from None
    parts = [path.with_name(name) for name in named if name.startswith(f"{path.name}-")]
    candidates = [listing, path.with_name(f"{path.name}.npy"), *parts]
    return [file for file in dict.fromkeys(candidates) if file.is_file()]


def _refuse_to_share(path: Path, files: Sequence[Path], before: Sequence[Path]) -> None:
    """Raise XLoRAError for a file that is another log's: `log` of length 5 and `log-5` both have log-5.npy."""
    for other in path.parent.glob("*-mapping.json"):
        named = other.read_text("utf-8", "replace") if other != _mapping_of(path) else ""
        for file in files:
            if any(mark + json.dumps(file.name)[1:] in named for mark in ('"', "/")):
                raise XLoRAError(f"{file} is of the log that {other} lists: choose another path")
    for file in files:
        if file.exists() and file not in before:
            raise XLoRAError(f"{file} is there, and of no log at {path}: choose another path, or delete it")


def _as_npy(tensors: Sequence[Tensor]) -> bytes:
    stacked = torch.stack([tensor.detach().cpu() for tensor in tensors])
    stacked = stacked if stacked.dtype in _NATIVE else stacked.float()
    buffer = io.BytesIO()
    np.save(buffer, stacked.numpy())
    return buffer.getvalue()


def _from_npy(file: Path, verbose: bool) -> Tensor:
    if not file.is_file():
        raise XLoRAError(
            f"there is no file {file}; give the path as flush_log_scalings had it, without an extension"
        )
    try:
        with file.open("rb") as opened:
            array = np.lib.format.read_array(opened, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise XLoRAError(f"{file} cannot be read: {error}") from None
    if array.ndim != 5 or array.dtype not in _READ:
        raise XLoRAError(
            f"{file} holds no scalings (num_logged, batch, seq, layers, experts) but {array.dtype} {array.shape}"
        )
    if verbose:
        print(f"{file}: scalings {array.shape}")
    return torch.from_numpy(array)

"""Writing an adapter so that it is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save as to_bytes
from torch import Tensor

from orbit.core.files import sync_folder, write_synced

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write(path: Path, text: str, tensors: dict[str, Tensor]) -> None:
    """Write the config's text and the tensors to a folder, or to one file if `path` ends in `.safetensors`."""
    if path.suffix == ".safetensors":
        content = to_bytes(tensors, {"format": "pt", "adapter_config": text})
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_files(path.parent, [(path.name, content)])
    else:
        write_folder(path, packed(text, tensors))


def packed(text: str, tensors: dict[str, Tensor]) -> list[tuple[str, bytes]]:
    """The names and contents of the files of an adapter's folder."""
    return [(WEIGHTS, to_bytes(tensors, {"format": "pt"})), (CONFIG, text.encode())]


def write_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files, by their names below `folder`: a new folder appears complete, in an old one each file is replaced.

    Files are asked for one at a time, and all of them before the first is put in its place; the last one given comes
    last.
    """
    if folder.is_dir():
        replace_files(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        names = _write_all(new, files)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():
                raise
            _move_all(new, folder, names)  # another process has made it meanwhile
    sync_folder(folder.parent)


def replace_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write files into a folder that is there; of those that it has under these names each is replaced whole."""
    with tempfile.TemporaryDirectory(prefix=".orbit.", dir=folder) as scratch:
        _move_all(Path(scratch), folder, _write_all(Path(scratch), files))


def _write_all(folder: Path, files: Iterable[tuple[str, bytes]]) -> list[str]:
    names = []
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(folder / name, content)
        names.append(name)
    _sync_all(folder, names)
    return names


def _move_all(source: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, folder / name)
    _sync_all(folder, names)


def _sync_all(folder: Path, names: Iterable[str]) -> None:
    """The folder and those below it that hold one of these files, the deepest first."""
    inside = {parent for name in names for parent in (folder / name).parents if parent.is_relative_to(folder)}
    for each in sorted(inside, key=lambda path: len(path.parts), reverse=True):
        sync_folder(each)

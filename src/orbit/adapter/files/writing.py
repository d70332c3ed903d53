"""Writing an adapter so that it is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
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
        _replace_files(path.parent, {path.name: content})
    else:
        _write_folder(path, {WEIGHTS: to_bytes(tensors, {"format": "pt"}), CONFIG: text.encode()})


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    if folder.is_dir():
        _replace_files(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        for name, content in files.items():
            write_synced(new / name, content)
        sync_folder(new)
        try:
            os.rename(new, folder)
        except OSError:
            if not folder.is_dir():
                raise
            _replace_files(folder, files)  # another process has made it meanwhile
    sync_folder(folder.parent)


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix=".orbit.", dir=folder) as scratch:
        for name, content in files.items():
            write_synced(Path(scratch) / name, content)
        for name in files:
            os.replace(Path(scratch) / name, folder / name)
    sync_folder(folder)

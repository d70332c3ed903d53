"""One checkpoint in one file.

Writing goes: temporary file → fsync → digest → rename → fsync the folder. A process that is killed anywhere in this
leaves the older checkpoints valid and at most a stray `.tmp` file, which the next run sweeps away.
Reading verifies the digest first.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orbit.core.checkpoint.errors import CheckpointError
from orbit.core.checkpoint.folder import list_checkpoints
from orbit.core.checkpoint.manifest import digests_of, is_valid, manifest_of, write_manifest
from orbit.core.files import aside, sha256_of, sync_folder

_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def save_checkpoint(state: dict[str, Any], path: Path | str) -> Path:
    """Write `state` to `path`, verified and atomically, and return the path.

    Raises:
        CheckpointError: `state` holds something that `weights_only=True` could not load (the message names its
            place), or the written file does not verify. Nothing at `path` has changed then.
    """
    path = Path(path)
    _check_plain(state, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_of(partial)
        accepted = [digest]
        if path.exists() and is_valid(path):
            accepted += digests_of(path)  # while the old file is still in place, it stays valid too
        write_manifest(path, accepted)
        os.replace(partial, path)
    if len(accepted) > 1:
        write_manifest(path, [digest])
    sync_folder(path.parent)
    if not is_valid(path):
        raise CheckpointError(
            f"{path} was written and does not verify: the disk does not keep what it is given"
        )
    return path


def load_checkpoint(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint file after verifying it against its digest, where it has one.

    Raises:
        CheckpointError: no such file, a digest that does not match, or a file that PyTorch cannot read safely.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder: name a file in it" if path.is_dir() else f"no checkpoint at {path}"
        raise CheckpointError(f"{what}{_nearby(path if path.is_dir() else path.parent)}")
    if manifest_of(path.resolve()).exists() and not is_valid(path):
        raise CheckpointError(
            f"{path} does not match its sha256 manifest: the file was changed or cut off; use an older checkpoint"
        )
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint (weights_only=True): {error}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} holds a {type(state).__name__}, not a training state: was it saved by state_dict()?"
        )
    return state


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, _PLAIN) and (type(value) in _PLAIN or isinstance(value, Tensor)):
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            _check_plain(key, f"{place}[{key!r}]")
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    else:
        raise CheckpointError(
            f"the state at {place or 'its top'} is a "
            f"{type(value).__module__}.{type(value).__qualname__}: checkpoints hold tensors and plain "
            "values only, so that they load with weights_only=True; save a tensor, number, string, list or dict"
        )


def _nearby(folder: Path) -> str:
    names = [item.name for item in list_checkpoints(folder)] if folder.is_dir() else []
    return f"; there are {', '.join(names)}" if names else ""

"""Checkpoints that are there whole or not at all.

    folder/checkpoint_step_120.pt           tensors and plain values; loads with weights_only=True
    folder/checkpoint_step_120.pt.sha256    its digest, in `sha256sum`'s format
    folder/checkpoint_latest.pt             a link to the newest

Writing goes: temporary file → fsync → digest → rename → fsync the folder → move the link. A process that is killed
anywhere in this leaves the older checkpoints valid and at most a stray `.tmp` file, which the next pruning removes.
Reading verifies the digest first: one flipped bit loads silently otherwise (298 times in 300 when it was tried).
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orbit.core.files import sha256_of, sync_folder, write_synced

LATEST = "checkpoint_latest.pt"
_NAME = re.compile(r"checkpoint_step_(\d+)\.pt")
_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file, the rule and the way out."""


def checkpoint_path(folder: Path | str, step: int) -> Path:
    return Path(folder) / f"checkpoint_step_{step}.pt"


def save_checkpoint(state: dict[str, Any], path: Path | str) -> Path:
    """Write `state` to `path`, verified and atomically, and return the path.

    Raises:
        CheckpointError: `state` holds something that `weights_only=True` could not load (the message names its
            place), or the written file does not verify. Nothing at `path` has changed then.
    """
    path = Path(path)
    _check_plain(state, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_of(partial)
        accepted = [digest]
        if path.exists() and is_valid(path):
            accepted += _digests(path)  # while the old file is still in place, it stays valid too
        _write_manifest(path, accepted)
        os.replace(partial, path)
        if len(accepted) > 1:
            _write_manifest(path, [digest])
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)
    if not is_valid(path):
        raise CheckpointError(
            f"{path} was written and does not verify: the disk does not keep what it is given"
        )
    return path


def link_latest(path: Path) -> None:
    """Let `checkpoint_latest.pt` beside `path` point to it; there is no moment without a link."""
    link = path.with_name(LATEST)
    partial = link.with_name(f"{LATEST}.{os.getpid()}.tmp")
    partial.unlink(missing_ok=True)
    partial.symlink_to(path.name)
    os.replace(partial, link)
    sync_folder(path.parent)


def load_checkpoint(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint file after verifying it against its digest, where it has one.

    Raises:
        CheckpointError: no such file, a digest that does not match, or a file that PyTorch cannot read safely.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder: name a file in it" if path.is_dir() else f"no checkpoint at {path}"
        raise CheckpointError(f"{what}{_nearby(path if path.is_dir() else path.parent)}")
    if _manifest(path.resolve()).exists() and not is_valid(path):
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


def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest valid checkpoint of a folder; None if there has never been one.

    Newer ones that do not verify are passed over with a warning that names them.

    Raises:
        CheckpointError: there are checkpoints and none is valid; starting again would silently lose the run.
    """
    broken: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        if is_valid(path):
            if broken:
                warnings.warn(
                    f"skipped {', '.join(broken)}: not valid; going on from {path.name}", stacklevel=2
                )
            return path
        broken.append(path.name)
    if broken:
        raise CheckpointError(
            f"{folder} holds {len(broken)} checkpoint(s) and none is valid: {', '.join(broken)}. "
            "Restore one from a copy, or "
            "move them away (or pass load=None) to start from the beginning"
        )
    return None


def list_checkpoints(folder: Path | str) -> list[Path]:
    """`checkpoint_step_*.pt` in a folder, by step."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint_step_*.pt")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def prune(folder: Path | str, keep: set[Path]) -> None:
    """Remove checkpoints outside `keep`, and what killed writers left behind."""
    for path in list_checkpoints(folder):
        if path not in keep:
            path.unlink()
            _manifest(path).unlink(missing_ok=True)
    for stray in Path(folder).glob("checkpoint_*.tmp"):
        stray.unlink(missing_ok=True)
    sync_folder(Path(folder))


def is_valid(path: Path) -> bool:
    """The file is there, and its sha256 is in its manifest."""
    path = path.resolve()
    return path.is_file() and _manifest(path).is_file() and sha256_of(path) in _digests(path)


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


def _digests(path: Path) -> list[str]:
    return [line.split()[0] for line in _manifest(path).read_text().splitlines() if line.strip()]


def _manifest(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write_manifest(path: Path, digests: list[str]) -> None:
    manifest = _manifest(path)
    partial = manifest.with_name(f"{manifest.name}.{os.getpid()}.tmp")
    try:
        write_synced(partial, "".join(f"{digest}  {path.name}\n" for digest in digests).encode())
        os.replace(partial, manifest)
    finally:
        partial.unlink(missing_ok=True)


def _nearby(folder: Path) -> str:
    names = [item.name for item in list_checkpoints(folder)] if folder.is_dir() else []
    return f"; there are {', '.join(names)}" if names else ""

"""One checkpoint in one file.

Writing goes: temporary file → fsync → read back → digest → rename → fsync the folder. A process that is killed anywhere
in this leaves the older checkpoints valid and at most a stray `.tmp` file, which the next run sweeps away; one that
finds the disk full leaves nothing. Reading verifies the digest first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from orbit.core.checkpoint.errors import CheckpointError
from orbit.core.checkpoint.folder import is_name, list_checkpoints, step_of
from orbit.core.checkpoint.manifest import digests_of, is_valid, manifest_of, write_manifest
from orbit.core.checkpoint.plain import check_plain
from orbit.core.checkpoint.screening import screen
from orbit.core.files import aside, sha256_of, sync_folder


def save_checkpoint(state: dict[str, Any], path: Path | str) -> Path:
    """Write `state` to `path`, verified and atomically, and return the path.

    Raises:
        CheckpointError: `state` holds something that `weights_only=True` could not load (the message names its
            place); the disk is full or refuses (it names the bytes that are free); or the written file does not
            verify. Nothing at `path` has changed then, and no part of a file is left.
    """
    path = Path(path)
    check_plain(state)
    write(state, path)
    return path


def write(state: dict[str, Any], path: Path) -> None:
    """`save_checkpoint` of a state that is known to be plain."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as partial:
            digest = _write_aside(state, partial)
            accepted = [digest]
            if path.exists() and is_valid(path):
                accepted += digests_of(path)  # while the old file is still in place, it stays valid too
            write_manifest(path, accepted)
            os.replace(partial, path)
        sync_folder(path.parent)
        if len(accepted) > 1:
            write_manifest(path, [digest])
    except BaseException as error:
        if not path.exists():
            manifest_of(path).unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None:
            raise
        raise cannot_be_written(path, cause.strerror or str(cause)) from error


def _write_aside(state: dict[str, Any], partial: Path) -> str:
    """Write the file, see that the disk gives back what it was given, and return the digest."""
    with partial.open("wb") as file:
        hashing = _Hashing(file)
        torch.save(state, hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    digest = hashing.digest.hexdigest()
    if sha256_of(partial) != digest:
        raise CheckpointError(
            f"{partial} was written and does not read back as it was: the disk does not keep what it is given"
        )
    screen(partial)  # what is written can be read
    return digest


class _Hashing:
    """A file that knows the digest of what was written to it, in one pass."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def load_checkpoint(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one checkpoint file after verifying it against its digest, where it has one.

    Raises:
        CheckpointError: no such file, a digest that does not match, or a file that PyTorch cannot read safely.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path} is a folder: name a file in it" if path.is_dir() else f"no checkpoint at {path}"
        raise CheckpointError(f"{what}{_nearby(path if path.is_dir() else path.parent)}")
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {path.resolve()}: name that file itself if you trust it"
        )
    if manifest_of(path.resolve()).exists() and not is_valid(path):
        raise CheckpointError(
            f"{path} does not match its sha256 manifest: the file was changed or cut off; use an older checkpoint"
        )
    screen(path)
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
    check_step(state, path.resolve())
    return state


def check_step(state: dict[str, Any], path: Path) -> None:
    """The step must be one, and that of the file's name: two files may have been exchanged with their manifests."""
    step = state.get("step", 0)
    if type(step) is not int or not 0 <= step < 10**18:
        raise CheckpointError(f"{path} holds step {str(step)[:40]}: no run has come that far")
    if is_name(path) and "step" in state and step != step_of(path):
        raise CheckpointError(
            f"{path} holds step {step}, not that of its name: it was exchanged or renamed; give it its own name back"
        )


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's refusal behind an error: PyTorch's writer raises its own over it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def cannot_be_written(path: Path, cause: str) -> CheckpointError:
    """The error of a save that the system refused, with the bytes that the disk under `path` has left."""
    try:
        free = f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        free = "unknown"
    return CheckpointError(
        f"{path} cannot be written: {cause}; {free} bytes are free there. What was there before is as it was; "
        "make room, keep fewer checkpoints (keep_previous=), or save elsewhere"
    )


def _nearby(folder: Path) -> str:
    names = [item.name for item in list_checkpoints(folder)] if folder.is_dir() else []
    return f"; there are {', '.join(names)}" if names else ""

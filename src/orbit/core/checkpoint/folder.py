"""Checkpoints side by side: which there are, which is the newest that is whole, and which may go."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from orbit.core.checkpoint.errors import CheckpointError
from orbit.core.checkpoint.manifest import is_valid, manifest_of
from orbit.core.files import aside, remove, strays, sync_folder

_LATEST = "checkpoint_latest"
_NAME = re.compile(r"checkpoint_step_([0-9]{1,18})(\.pt)?")


def checkpoint_path(folder: Path | str, step: int, sharded: bool = False) -> Path:
    """Where the checkpoint of a step lies: a file, or with `sharded` a folder."""
    return Path(folder) / f"checkpoint_step_{step}{'' if sharded else '.pt'}"


def list_checkpoints(folder: Path | str) -> list[Path]:
    """`checkpoint_step_*`, files (`.pt`) and folders, by step."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint_step_*")
        if (match := _NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def is_name(path: Path) -> bool:
    """Is it called `checkpoint_step_<step>`, with or without `.pt`?"""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name. ValueError if it is no such name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name!r} is no checkpoint's name: they are called checkpoint_step_<step>.pt")
    return int(match[1])


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


def link_latest(path: Path) -> None:
    """Let `checkpoint_latest.pt` (`checkpoint_latest` of a folder) point to `path`, which lies beside it.

    There is no moment without a link.
    """
    link = path.with_name(f"{_LATEST}{path.suffix}")
    with aside(link) as partial:
        partial.symlink_to(path.name)
        os.replace(partial, link)
    for other in {_LATEST, f"{_LATEST}.pt"} - {link.name}:  # of a run that was sharded before, or was not
        path.with_name(other).unlink(missing_ok=True)
    sync_folder(path.parent)


def prune(folder: Path | str, keep: set[Path]) -> None:
    """Remove the checkpoints that are not in `keep`."""
    for path in list_checkpoints(folder):
        if path in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            with aside(path) as partial:  # killed in between, it leaves no half of a checkpoint
                os.replace(path, partial)
        else:
            path.unlink()
            manifest_of(path).unlink(missing_ok=True)
    sync_folder(Path(folder))


def sweep(folder: Path | str) -> list[str]:
    """Remove what killed writers left in a folder, and return the names.

    What a living process writes stays. Call it where no other writer can begin: with the folder's lock.
    """
    folder = Path(folder)
    found = [path for path in strays(folder) if path.name.startswith("checkpoint_")]
    found += [
        path for path in folder.glob("checkpoint_step_*.pt.sha256") if not path.with_suffix("").exists()
    ]
    for path in found:
        remove(path)
    if found:
        sync_folder(folder)
    return sorted(path.name for path in found)

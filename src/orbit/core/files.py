"""Writing that survives a crash: bytes that have reached the disk before anything points at them.

Whoever saves writes a new file (`write_synced`), renames it over the old one, and then calls `sync_folder`: until
then the rename itself may be lost.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries: the names of new, renamed and removed files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def in_workspace(trainer: Any, path: Path) -> Path:
    """`path`; a relative one lies in the trainer's workspace, if it has one."""
    workspace: Path | None = getattr(trainer, "workspace", None)
    return path if workspace is None else workspace / path

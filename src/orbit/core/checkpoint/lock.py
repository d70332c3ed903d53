"""One writer a folder.

Two runs that write to one folder would prune and overwrite each other's checkpoints. The writer holds a POSIX record
lock on `folder/.lock`, which the kernel frees when the process dies, however it dies, and which forked data workers
do not inherit. The file says who holds it. Within one process record locks do not exclude each other, and closing
any handle of the file frees them: there a table says what is held, and the file is not opened twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

from orbit.core.checkpoint.folder import sweep

LOCK = ".lock"
_CANNOT = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_held: dict[Path, int] = {}  # folder → the process that took it; a forked child holds nothing


class WorkspaceLockedError(RuntimeError):
    """Somebody else writes to this folder; the message names process and host."""


class FolderLock:
    """The right to write to `folder`, from `acquire` until `release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None and _held.get(self.folder) == os.getpid()

    def acquire(self) -> None:
        """Take the lock; nothing if it is held already. The folder is made if it is not there.

        Where the file system has no locks, that is a warning, and the folder counts as taken in this process.

        Raises:
            WorkspaceLockedError: another process, or another object of this one, holds it. OSError: the folder
                cannot be made or written to.
        """
        if self.held:
            return
        if _held.get(self.folder) == os.getpid():
            own = {"pid": os.getpid(), "host": socket.gethostname()}
            raise self._refused(
                own, " (it is this process: `with engine:` closes a loop that an exception left)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._lock(handle)
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
            with contextlib.suppress(OSError):  # a full disk: it only says less in the other's message
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(owner).encode(), 0)
        except BaseException:
            os.close(handle)
            raise
        self._handle, _held[self.folder] = handle, os.getpid()

    def release(self) -> None:
        """Give it back; nothing if it is not held."""
        if self.held:
            assert self._handle is not None
            del _held[self.folder]
            os.close(self._handle)  # which frees the lock
        self._handle = None

    def _lock(self, handle: int) -> None:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise self._refused(_owner(os.pread(handle, 4096, 0))) from None
            if error.errno not in _CANNOT:
                raise
            warnings.warn(
                f"{self.folder} is not locked: its file system cannot ({error.strerror}); see that no other run writes "
                "there",
                stacklevel=3,
            )

    def _refused(self, owner: dict[str, Any], hint: str = "") -> WorkspaceLockedError:
        since = f" since {owner['since']}" if "since" in owner else ""
        return WorkspaceLockedError(
            f"{self.folder} is being written to by process {owner.get('pid', 'unknown')} on "
            f"{owner.get('host', 'an unknown host')}{since}: two runs in one folder would overwrite each other's "
            f"checkpoints; wait for it, end it, or give this run a path of its own{hint}"
        )


def taken(lock: FolderLock | None, folder: Path, logger: logging.Logger) -> FolderLock:
    """The right to write to `folder`, by this lock if it is held or else by a new one. With a new one, what a killed
    run left there goes, and is told.

    Raises: as `FolderLock.acquire`.
    """
    if lock is not None and lock.held:
        return lock
    lock = FolderLock(folder)
    lock.acquire()
    if gone := sweep(folder):
        logger.info("removed what a killed run left: %s", ", ".join(gone))
    return lock


def _owner(text: bytes) -> dict[str, Any]:
    """What the holder wrote about itself; nothing if it is just doing so."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}

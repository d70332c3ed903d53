"""One writer a folder; two processes are tried by the fault suite's case `two_writers`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from faults.processes import in_child
from orbit.core.checkpoint.lock import LOCK, FolderLock, WorkspaceLockedError


def test_the_second_is_refused_by_name_until_the_first_gives_it_back(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path / "deep" / "folder"), FolderLock(tmp_path / "deep" / "." / "folder")
    first.acquire()
    first.acquire()
    assert first.held
    owner = json.loads((tmp_path / "deep" / "folder" / LOCK).read_text())
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(WorkspaceLockedError, match=f"process {os.getpid()} on .*it is this process"):
        second.acquire()
    assert not second.held
    first.release()
    second.acquire()
    first.release()
    assert second.held, "a lock that is no longer held gives nothing back"
    second.release()


def test_a_forked_child_holds_nothing_and_frees_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()

    def child() -> str:
        assert not lock.held
        lock.release()
        try:
            FolderLock(tmp_path).acquire()
        except WorkspaceLockedError as error:
            return str(error)
        return "taken"

    for _ in range(2):
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in in_child(child)
    lock.release()
    assert in_child(child) == "taken"


def test_who_holds_it_may_be_unreadable(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    with (tmp_path / LOCK).open("r+b") as file:  # in this process closing it frees the lock: kept open
        file.truncate(3)
        file.flush()

        def child() -> str:
            with pytest.raises(WorkspaceLockedError) as refused:
                FolderLock(tmp_path).acquire()
            return str(refused.value)

        assert "process unknown on an unknown host" in in_child(child)
    lock.release()


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = FolderLock(tmp_path)
    with pytest.warns(UserWarning, match="is not locked: its file system cannot .No locks"):
        lock.acquire()
    assert lock.held
    lock.release()


def test_another_refusal_of_the_system_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    lock = FolderLock(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        lock.acquire()
    monkeypatch.undo()
    lock.acquire()
    lock.release()


def test_a_link_in_place_of_the_lock_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        FolderLock(tmp_path / "folder").acquire()
    assert (tmp_path / "victim").read_text() == "precious"

"""Content is replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orbit.core import files
from orbit.core.files import aside, remove, replace_synced, strays


def test_replacing_leaves_the_new_content_alone_in_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "a"
    replace_synced(path, b"one")
    replace_synced(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stage", ["write_synced", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    path = tmp_path / "a"
    replace_synced(path, b"old")
    real = getattr(files if stage == "write_synced" else os, stage)

    def fail(*arguments: Any) -> None:
        if stage == "write_synced":
            real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if stage == "write_synced" else os, stage, fail)
    with pytest.raises(OSError, match="No space"):
        replace_synced(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    with aside(tmp_path / "a") as one, aside(tmp_path / "a") as other:
        assert one != other
        one.write_bytes(b"1")
        assert strays(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_remove_takes_folders_and_leaves_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("folder", "link", "absent"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]

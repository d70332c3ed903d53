"""Checkpoints are there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orbit.core import CheckpointError, checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from orbit.core.files import aside


def save(folder: Path, *steps: int) -> list[Path]:
    paths = [
        save_checkpoint(
            {"step": step, "w": torch.full((64,), float(step))}, checkpoint.checkpoint_path(folder, step)
        )
        for step in steps
    ]
    checkpoint.link_latest(paths[-1])
    return paths


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_round_trip_with_a_manifest_that_sha256sum_reads(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    assert load_checkpoint(path)["step"] == 3
    assert load_checkpoint(tmp_path / "checkpoint_latest.pt")["w"].sum() == 64 * 3
    done = subprocess.run(
        ["sha256sum", "-c", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{path.name}: OK\n"
    assert os.readlink(tmp_path / "checkpoint_latest.pt") == path.name


def test_one_flipped_bit_is_noticed_and_the_older_one_taken(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 3, 9)
    flip_a_bit(newer)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        load_checkpoint(newer)
    with pytest.warns(
        UserWarning, match=r"skipped checkpoint_step_9.pt: not valid; going on from checkpoint_step_3.pt"
    ):
        assert latest_checkpoint(tmp_path) == older


def test_none_valid_is_an_error_and_never_a_silent_restart(tmp_path: Path) -> None:
    for path in save(tmp_path, 3, 9):
        flip_a_bit(path)
    with pytest.raises(
        CheckpointError, match="2 checkpoint.* and none is valid: checkpoint_step_9.pt, checkpoint_step_3.pt"
    ):
        latest_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path / "never") is None


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    paths = save(tmp_path, 9, 10, 100)
    assert latest_checkpoint(tmp_path) == paths[2]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 3)
    save_checkpoint({"step": 3, "new": True}, path)
    assert load_checkpoint(path)["new"] is True
    subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=tmp_path, capture_output=True, check=True)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (np.float32(1.0), r"\['a'\]\[1\] is a numpy.float32"),
        (Path("x"), r"\['a'\]\[1\] is a pathlib"),
        (len, "builtins.builtin_function"),
    ],
)
def test_what_would_not_load_safely_is_refused_before_writing(tmp_path: Path, value: Any, place: str) -> None:
    with pytest.raises(CheckpointError, match=place):
        save_checkpoint({"a": [1, value]}, tmp_path / "checkpoint_step_1.pt")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_and_absent_files_say_what_and_where(tmp_path: Path) -> None:
    save(tmp_path, 4)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*checkpoint_step_5.pt; there are checkpoint_step_4.pt"
    ):
        load_checkpoint(tmp_path / "checkpoint_step_5.pt")
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(garbage)
    torch.save([1], garbage)
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(garbage)
    with pytest.raises(CheckpointError, match="is a folder: name a file in it; there are checkpoint_step_"):
        load_checkpoint(tmp_path)


def test_prune_keeps_what_it_is_told(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2, 3)
    sharded(tmp_path, 4)
    kept = sharded(tmp_path, 5)
    checkpoint.prune(tmp_path, {paths[0], paths[2], kept})
    assert sorted(item.name for item in tmp_path.iterdir()) == [
        "checkpoint_latest.pt",
        "checkpoint_step_1.pt",
        "checkpoint_step_1.pt.sha256",
        "checkpoint_step_3.pt",
        "checkpoint_step_3.pt.sha256",
        "checkpoint_step_5",
    ]


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = sorted(item.name for item in tmp_path.iterdir())
    with aside(tmp_path / "checkpoint_step_2.pt") as living:
        living.write_bytes(b"half")
        others = f"checkpoint_step_2.pt.{os.getppid()}-0.tmp"
        left = [f"checkpoint_step_2.pt.{dead_process()}-3.tmp", f"checkpoint_step_2.pt.{os.getpid()}-999.tmp"]
        for name in (others, "notes.tmp", *left, "checkpoint_step_7.pt.sha256"):
            (tmp_path / name).write_bytes(b"half")
        half = tmp_path / f"checkpoint_step_3.{dead_process()}-4.tmp"
        half.mkdir()
        (half / "shard").write_bytes(b"half")
        assert checkpoint.sweep(tmp_path) == sorted([*left, half.name, "checkpoint_step_7.pt.sha256"])
        there = {item.name for item in tmp_path.iterdir()}
        assert there == {*before, others, "notes.tmp", living.name}
    assert not living.exists()


def sharded(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint_step_{step}"
    (path / "parts").mkdir(parents=True)
    (path / "meta").write_bytes(b"what lies where")
    (path / "parts" / "0.bin").write_bytes(bytes(range(256)) * step)
    checkpoint.write_folder_manifest(path)
    return path


def test_a_folder_is_a_checkpoint_too(tmp_path: Path) -> None:
    (older,), newer = save(tmp_path, 3), sharded(tmp_path, 9)
    assert checkpoint.list_checkpoints(tmp_path) == [older, newer]
    assert latest_checkpoint(tmp_path) == newer
    assert subprocess.run(["sha256sum", "-c", "--quiet", "manifest.sha256"], cwd=newer).returncode == 0
    checkpoint.link_latest(newer)
    assert os.readlink(tmp_path / "checkpoint_latest") == newer.name
    assert not (tmp_path / "checkpoint_latest.pt").is_symlink()
    assert checkpoint.is_valid(tmp_path / "checkpoint_latest")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_a_bit(path / "parts" / "0.bin"),
        lambda path: (path / "meta").unlink(),
        lambda path: (path / "extra").touch(),
        lambda path: (path / "parts" / "extra").symlink_to(path / "meta"),
        lambda path: (path / "manifest.sha256").unlink(),
        lambda path: flip_a_bit(path / "manifest.sha256"),
        lambda path: (path / "manifest.sha256").write_bytes(b"\xff\xfe"),
    ],
    ids=["flipped", "missing", "extra", "link", "no manifest", "manifest flipped", "manifest garbage"],
)
def test_a_damaged_folder_is_passed_over(tmp_path: Path, damage: Any) -> None:
    older, newer = sharded(tmp_path, 3), sharded(tmp_path, 9)
    damage(newer)
    with pytest.warns(
        UserWarning, match=r"skipped checkpoint_step_9: not valid; going on from checkpoint_step_3"
    ):
        assert latest_checkpoint(tmp_path) == older


def test_the_file_being_replaced_stays_valid_until_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that dies between the new manifest and the new file leaves the old file readable."""
    (path,) = save(tmp_path, 3)
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"step": 3, "new": True}, path)
    assert load_checkpoint(path)["w"].sum() == 64 * 3
    assert latest_checkpoint(tmp_path) == path


KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
from orbit.core import checkpoint

folder = Path(sys.argv[1])
for delay in map(float, sys.argv[2:]):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        state = {"w": torch.randn(400_000)}
        for step in range(10_000):
            path = checkpoint.checkpoint_path(folder, step % 5)
            checkpoint.save_checkpoint(state | {"step": step % 5}, path)
            checkpoint.link_latest(path)
            os.write(write, b".")
    while len(os.read(read, 1)) and not (folder / "checkpoint_step_4.pt").exists():
        pass
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.list_checkpoints(folder)
    assert len(found) == 5, found
    for path in [*found, folder / "checkpoint_latest.pt"]:
        assert checkpoint.is_valid(path), path
        state = checkpoint.load_checkpoint(path)
        assert state["step"] == checkpoint.step_of(path.resolve()), path
    print("survived", delay)
"""


def test_a_writer_killed_at_any_moment_leaves_valid_checkpoints(tmp_path: Path) -> None:
    """Steps 0-4 are overwritten in turn; kill -9 at many moments never leaves an invalid file."""
    delays = [str(0.0015 * moment**1.5) for moment in range(12)]
    command = [sys.executable, "-W", "error", "-c", KILLER, str(tmp_path), *delays]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("survived") == 12

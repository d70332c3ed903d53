"""A disk that has no room for the next checkpoint.

RLIMIT_FSIZE lets files grow to a certain size and not beyond, at sizes from nothing to one byte too few, and, where
this user may mount one, a tmpfs really fills up. The run must end with an error that names the path and the bytes that
are free, the checkpoint before must be as it was, and no part of a file may be left.
"""

from __future__ import annotations

import random
import resource
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from faults.processes import in_child
from faults.result import Result
from faults.saving import Saving
from orbit.core import CheckpointError, checkpoint


def run(short: bool, seed: int) -> Result:
    chance = random.Random(seed)
    wrong: list[str] = []
    limits = 6 if short else 40
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _first(folder)
        sizes = [0, 1, size - 1, *(chance.randrange(size) for _ in range(limits - 3))]
        for number, limit in enumerate(sizes):
            wrong += _starve(folder, f"limit {limit}", lambda limit=limit: _limit(limit), number % 2 == 1)  # type: ignore[misc]
    mounted = _on_tmpfs(wrong)
    total = limits + mounted
    return Result(
        "full_disk",
        f"{limits} saves under RLIMIT_FSIZE, {mounted} on a full tmpfs (0: none may be mounted); half asynchronous",
        f"{total - len(wrong)}/{total} ended with an error naming path and free bytes, the checkpoint before intact, "
        "nothing else left" + "".join(f"; WRONG {line}" for line in wrong[:5]),
        not wrong,
    )


def _first(folder: Path) -> int:
    in_child(lambda: Saving(folder, steps=1).train())
    return checkpoint.checkpoint_path(folder, 1).stat().st_size


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _starve(folder: Path, what: str, starve: Callable[[], None], asynchronous: bool) -> list[str]:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    def work() -> str:
        trainer = Saving(folder, steps=3, asynchronous=asynchronous)
        trainer.build()
        starve()
        try:
            trainer.train()
        except CheckpointError as error:
            return str(error)
        return "no error"

    said = in_child(work)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    if f"{folder}/checkpoint_step_" not in said or "bytes are free" not in said:
        return [f"{what}: {said}"]
    if after != before:
        return [f"{what}: {sorted(after)} was left of {sorted(before)}"]
    found = checkpoint.latest_checkpoint(folder)
    return [] if found is not None and checkpoint.step_of(found) == 1 else [f"{what}: {found} is the newest"]


def _on_tmpfs(wrong: list[str]) -> int:
    """How many saves were tried on a tmpfs of 4 MB that holds one checkpoint of 1.6 and a file of 1.5."""
    with tempfile.TemporaryDirectory() as name:
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", name], capture_output=True, check=False
        )
        if mount.returncode:
            return 0
        try:
            folder = Path(name) / "checkpoints"
            _first(folder)
            (Path(name) / "else").write_bytes(bytes(1500 << 10))
            for asynchronous in (False, True):
                wrong += _starve(folder, "tmpfs", lambda: None, asynchronous)
        finally:
            subprocess.run(["umount", name], check=True)
        return 2

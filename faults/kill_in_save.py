"""A writer that is killed in the middle of a save, again and again, in one folder.

Each time a run resumes there, saves at every step, says which checkpoints are on the disk, and dies: by kill -9 at a
random time, or at a fixed byte of the file it writes, where the kernel ends it (RLIMIT_FSIZE with SIGXFSZ's default
action; no line of Python runs after it). Then the newest valid checkpoint must be there, load, hold the step of its
name, and not be older than the last one that the run has said is on the disk.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from faults.processes import fork, wait
from faults.result import Result
from faults.saving import Saving, lines
from orbit.core import Plugin, checkpoint


def run(short: bool, seed: int) -> Result:
    chance = random.Random(seed)
    kills, offsets = (8, 6) if short else (100, 40)
    loadable = current = swept = strays = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = _first(folder)
        deaths: list[tuple[float | None, int | None]] = [
            (chance.uniform(0, 0.06), None) for _ in range(kills)
        ]
        deaths += [(None, size * n // (offsets - 1)) for n in range(offsets)]
        for number, (delay, offset) in enumerate(deaths):
            clean, said = _live_and_die(folder, delay, offset, asynchronous=number % 2 == 1)
            swept += clean
            strays += len(list(folder.glob("*.tmp")))
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing may have to be skipped
                newest = checkpoint.latest_checkpoint(folder)
            assert newest is not None
            step = checkpoint.load_checkpoint(newest)["step"]
            loadable += step == checkpoint.step_of(newest)
            current += step >= said
    total = len(deaths)
    return Result(
        "kill_in_save",
        f"{kills} kill -9 at random times during saves, {offsets} deaths at fixed bytes of the file; half of them "
        "of an asynchronous save",
        f"{loadable}/{total} loadable, {current}/{total} not older than the last acknowledged save; {strays} "
        f"temporary files were left and {total - swept} starts left any of them",
        loadable == current == swept == total and strays > 0,
    )


def _first(folder: Path) -> int:
    """A checkpoint to begin with; its size."""
    wait(fork(Saving(folder, steps=1).train), 60)
    return checkpoint.checkpoint_path(folder, 1).stat().st_size


def _live_and_die(
    folder: Path, delay: float | None, offset: int | None, asynchronous: bool
) -> tuple[bool, int]:
    """Did the start leave no stray file, and the newest step that the run said is on the disk."""
    read, write = os.pipe()
    before = set(folder.glob("*.tmp"))

    class AtStart(Plugin):
        def on_before_train(self, trainer: Any) -> None:
            os.write(write, b"strays\n" if any(path.exists() for path in before) else b"clean\n")
            if offset is not None:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))

    def live() -> None:
        os.close(read)
        trainer = Saving(folder, told=write, asynchronous=asynchronous)
        trainer.attach(AtStart())
        trainer.train()

    child = fork(live)
    os.close(write)
    told = lines(read)
    start = next(told)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    said = max((int(line) for line in told), default=0)
    code = wait(child, 60)
    if code not in (-signal.SIGKILL, -signal.SIGXFSZ):
        raise RuntimeError(f"the run ended with {code} before it was killed")
    return start == "clean", said

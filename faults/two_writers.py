"""Two runs in one workspace: one writes, the other refuses and says who writes; whoever dies makes room.

Four ways: another process while the first one trains; the same process; after the first one was killed; and while a
data worker that the dead writer forked is still alive, which must not keep the lock.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.processes import fork, in_child, wait
from faults.result import Result
from faults.saving import Saving, lines
from orbit.core import Plugin, checkpoint
from orbit.core.checkpoint.lock import WorkspaceLockedError


def run(short: bool, seed: int) -> Result:
    rounds = 1 if short else 5
    ways: dict[str, Callable[[Path], str]] = {
        "another process": _another_process,
        "the same process": lambda folder: in_child(lambda: _same_process(folder)),
        "after kill -9": _after_a_kill,
        "with an orphaned worker": _with_an_orphan,
    }
    wrong = []
    for _ in range(rounds):
        for way, check in ways.items():
            with tempfile.TemporaryDirectory() as name:
                why = check(Path(name))
                wrong += [f"{way}: {why}"] if why else []
    total = rounds * len(ways)
    return Result(
        "two_writers",
        f"{rounds} × ({', '.join(ways)})",
        f"{total - len(wrong)}/{total}: one writer, the other refused naming process and host; freed on death"
        + "".join(f"; WRONG {line}" for line in wrong[:5]),
        not wrong,
    )


class _Forks(Plugin):
    """A child that outlives its parent, as a data worker may."""

    def __init__(self, told: int) -> None:
        self.told = told

    def on_before_train(self, trainer: Any) -> None:
        child = fork(lambda: time.sleep(30))
        os.write(self.told, f"child {child}\n".encode())


def _writer(folder: Path, orphan: bool = False) -> tuple[int, Any]:
    """A run that writes until it is killed, once it does; and what it says."""
    read, write = os.pipe()

    def work() -> None:
        os.close(read)
        trainer = Saving(folder, told=write)
        if orphan:
            trainer.attach(_Forks(write))
        trainer.train()

    child = fork(work)
    os.close(write)
    told = lines(read)
    first = next(told)
    if orphan:
        next(told)
    return child, (told, first)


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    wait(child, 10)


def _refusal(folder: Path) -> str:
    try:
        Saving(folder, steps=100_000).train()
    except WorkspaceLockedError as error:
        return str(error)
    return "it was not refused"


def _another_process(folder: Path) -> str:
    child, _ = _writer(folder)
    try:
        said = in_child(lambda: _refusal(folder))
    finally:
        _kill(child)
    named = f"process {child} on {socket.gethostname()}" in said
    return "" if named else said


def _same_process(folder: Path) -> str:
    said = ""

    class Second(Plugin):
        def on_after_step(self, trainer: Any) -> None:
            nonlocal said
            said = said or _refusal(folder)

    trainer = Saving(folder, steps=2)
    trainer.attach(Second())
    trainer.train()
    if f"process {os.getpid()} on {socket.gethostname()}" not in said:
        return said or "nothing was tried"
    Saving(folder, steps=3).train()  # on_close has freed it
    return "" if checkpoint.checkpoint_path(folder, 3).exists() else "step 3 was not saved"


def _after_a_kill(folder: Path) -> str:
    child, _ = _writer(folder)
    _kill(child)
    return in_child(lambda: _goes_on(folder))


def _with_an_orphan(folder: Path) -> str:
    child, (_, line) = _writer(folder, orphan=True)
    _kill(child)
    try:
        return in_child(lambda: _goes_on(folder))
    finally:
        os.kill(int(line.split()[1]), signal.SIGKILL)


def _goes_on(folder: Path) -> str:
    found = checkpoint.latest_checkpoint(folder)
    step = 0 if found is None else checkpoint.step_of(found)
    Saving(folder, steps=step + 2).train()
    return "" if checkpoint.checkpoint_path(folder, step + 2).exists() else f"step {step + 2} was not saved"

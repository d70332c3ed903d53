"""kill -9 at a random time of a run, again and again until it comes to its end: the end must be the very same bits.

Each run is killed several times (at random times of its remaining length, which hits steps, saves, evaluations, the
workers' start and the build alike) and begun again in its folder. The whole final state is compared with that of a
run that was left in peace: model, averages, optimizer, scheduler, scaler, random generators, place, plugins.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.compare import difference
from faults.processes import fork, wait
from faults.result import Result
from faults.training import FACES, final, keep_final


def run(short: bool, seed: int) -> Result:
    chance = random.Random(seed)
    kills = 4 if short else 60
    finished, killed, wrong = 0, 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wholes: dict[tuple[str, int], tuple[dict[str, Any], float]] = {}
        kinds = [(face, workers) for face in FACES for workers in (0, 2)][:: 3 if short else 1]
        while killed < kills or finished < len(kinds):
            face, workers = kind = kinds[finished % len(kinds)]
            if kind not in wholes:
                began = time.monotonic()
                _end(folder / f"whole-{face}{workers}", face, workers)
                wholes[kind] = final(folder / f"whole-{face}{workers}" / "final.pt"), time.monotonic() - began
            state, seconds = wholes[kind]
            here = folder / f"run-{finished}"
            for _ in range(2 if short else 4):
                died = _end(here, face, workers, kill_after=chance.uniform(0, 0.8 * seconds))
                killed += died
                if not died:
                    break
            if not (here / "final.pt").exists():
                _end(here, face, workers)
            finished += 1
            if (found := difference(final(here / "final.pt"), state)) is not None:
                wrong.append(f"{face} with {workers} workers: {found}")
    return Result(
        "kill_in_training",
        f"{killed} kill -9 at random times of {finished} runs (both faces, 0 and 2 workers, everything in)",
        f"{finished - len(wrong)}/{finished} finished runs bitwise the uninterrupted one"
        + "".join(f"; {line}" for line in wrong[:3]),
        not wrong and killed >= kills,
    )


def _silently(work: Callable[[], None]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work()


def _end(here: Path, face: str, workers: int, kill_after: float | None = None) -> bool:
    """One process, to its end or to its death; whether it was killed."""
    here.mkdir(exist_ok=True)
    work = keep_final(here / "final.pt", face, here / "checkpoints", workers=workers)
    child = fork(
        work if kill_after is None else lambda: _silently(work)
    )  # workers say that their parent is gone
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    code = wait(child, 60)
    if code not in (0, -signal.SIGKILL):
        raise AssertionError(f"a run that was begun again ended with {code}")
    return code != 0

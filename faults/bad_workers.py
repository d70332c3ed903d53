"""A loader's worker raises, is killed, or hangs in the middle of a run.

The error must name the worker and the sample, hold the worker's own traceback, and come within a second of the loader's
timeout where it hangs; and what is begun again in the run's folder, with the fault gone, must end at the same bits as a
run that was left in peace.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from faults.compare import difference
from faults.processes import fork, in_child, wait
from faults.result import Result
from faults.training import FACES, SAMPLES, final, keep_final, train
from orbit.core import WorkerError

FAULTS = {
    "raises": "raised OSError",
    "is killed": "was killed by signal 9",
    "hangs": "gave nothing for 0.5 s",
}
TIMEOUT = 0.5


class Fault:
    """Strikes when its sample is fetched the third time: in the third epoch."""

    def __init__(self, kind: str, sample: int, folder: Path) -> None:
        self.kind, self.sample, self.fetched, self.struck = (
            kind,
            sample,
            folder / "fetched",
            folder / "struck",
        )

    def __call__(self, index: int) -> None:
        if index != self.sample:
            return
        with self.fetched.open("a") as file:  # workers are new in every epoch
            file.write("x")
        if self.fetched.stat().st_size < 3:
            return
        self.struck.write_text(str(time.monotonic()))
        if self.kind == "raises":
            raise OSError("the disk with this sample is gone")
        if self.kind == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)


def run(short: bool, seed: int) -> Result:
    wrong, slowest, count = list[str](), 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for face in FACES:
            whole = folder / f"whole-{face}.pt"
            assert wait(fork(keep_final(whole, face, folder / f"whole-{face}", workers=2)), 60) == 0
            for kind, told in FAULTS.items():
                if short and (kind == "raises") != (face == FACES[0]):
                    continue
                for sample in (
                    [(seed + 7) % SAMPLES] if short else [(seed + 7 * n) % SAMPLES for n in range(5)]
                ):
                    count += 1
                    here = folder / f"run-{count}"
                    here.mkdir()
                    found, late = _strike(here, face, kind, told, sample)
                    slowest = max(slowest, late)
                    assert wait(fork(keep_final(here / "final.pt", face, here / "run", workers=2)), 60) == 0
                    differs = difference(final(here / "final.pt"), final(whole))
                    if found or differs:
                        wrong.append(f"{face}, a worker {kind}: {found or differs}")
    return Result(
        "bad_workers",
        f"a worker raises, is killed, hangs (timeout {TIMEOUT} s) in the third epoch, {count} runs",
        f"{count - len(wrong)}/{count} named with worker and sample, resumed bitwise; hang told after at most "
        f"{slowest:.2f} s" + "".join(f"; {line}" for line in wrong[:3]),
        not wrong and slowest <= TIMEOUT + 1,
    )


def _strike(here: Path, face: str, kind: str, told: str, sample: int) -> tuple[str, float]:
    """What is wrong with the error ("" if nothing), and how long after the fault it came, of a hang."""
    fault = Fault(kind, sample, here)

    def go() -> list[object]:
        try:
            train(face, here / "run", workers=2, visit=fault, timeout=TIMEOUT if kind == "hangs" else 0)
        except WorkerError as error:
            return [time.monotonic(), error.worker, error.sample, str(error), str(error.__cause__)]
        return [time.monotonic(), None, None, "nothing was raised", ""]

    at, worker, named, text, cause = in_child(go, 60)
    if told not in text or worker not in (0, 1) or named != sample or f"at sample {sample}" not in text:
        return text, 0.0
    if kind == "raises" and "the disk with this sample is gone" not in cause:
        return f"the worker's traceback is lost: {cause}", 0.0
    return "", at - float(fault.struck.read_text()) if kind == "hangs" else 0.0

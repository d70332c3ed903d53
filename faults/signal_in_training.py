"""SIGTERM or SIGINT at ten points of a run, once and twice.

Once: the run saves at its next step boundary, leaves with 128 + signal, and what is begun again in its folder ends at
the same bits as a run that was left in peace. Twice, also with two kinds: the process is gone within a second of the
second one, and a run that is begun again still ends at the same bits.
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
from faults.training import ACCUMULATION, FACES, final, keep_final
from orbit.core import Plugin, checkpoint

TERM, INT = signal.SIGTERM, signal.SIGINT
AT = 9  # the optimizer step at which the signal comes, where the point does not say otherwise


class Sender(Plugin):
    """Sends its signals once, at `point`, and says on `told` at which step and, of the second, when."""

    priority = 50  # before checkpoints and what else the run has

    def __init__(self, point: str, numbers: tuple[int, ...], told: int) -> None:
        self.point, self.numbers, self.told = point, numbers, told
        self.sent = self.evaluated = False

    def send(self, step: int, to: int | None = None) -> None:
        if self.sent:
            return
        self.sent = True
        os.write(self.told, f"step {step}\n".encode())
        for place, number in enumerate(self.numbers):
            if place:
                time.sleep(0.15)
                os.write(self.told, f"second {time.monotonic()}\n".encode())
            os.kill(os.getpid() if to is None else to, number)
        time.sleep(0)  # Python calls handlers between two lines

    def at(self, trainer: Any, point: str, here: bool = True) -> None:
        if self.point == point and here and trainer.step == AT:
            self.send(trainer.step)

    def on_before_train(self, trainer: Any) -> None:
        trainer.unwrapped_model.register_forward_pre_hook(
            lambda *_: self.at(trainer, "forward", trainer.phase == "train")
        )
        next(trainer.unwrapped_model.parameters()).register_hook(lambda grad: self.at(trainer, "backward"))
        trainer.optimizer.register_step_pre_hook(lambda *_: self.at(trainer, "optimizer step"))

    def on_before_epoch(self, trainer: Any) -> None:
        if self.point == "before the first step" and trainer.step == 0:
            self.send(0)

    def on_before_batch(self, trainer: Any) -> None:
        self.at(trainer, "mid-accumulation", trainer.window_open)

    def on_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        if self.point == "save" and trainer.step >= AT:
            self.send(trainer.step)
        if self.point == "save after an evaluation" and self.evaluated:
            self.send(trainer.step)

    def on_after_eval(self, trainer: Any) -> None:
        self.evaluated = True

    def on_before_eval(self, trainer: Any) -> None:
        if self.point == "evaluation":
            self.send(trainer.step)

    def on_after_epoch(self, trainer: Any) -> None:
        if self.point == "epoch's end":
            self.send(trainer.step)

    def fetch(self, parent: int, index: int) -> None:
        """In a worker, which knows no steps."""
        if self.point == "worker's fetch" and index == 17:
            self.send(-1, parent)


POINTS = (
    "before the first step", "mid-accumulation", "forward", "backward", "optimizer step", "save", "worker's fetch",
    "evaluation", "epoch's end", "save after an evaluation",
)  # fmt: skip


def run(short: bool, seed: int) -> Result:
    chance = random.Random(seed)
    kinds = [(point, face) for point in POINTS for face in FACES]
    if short:  # each point under one face
        kinds = [(point, FACES[i % 2]) for i, point in enumerate(POINTS)]
    wrong: list[str] = []
    slowest, seconds = 0.0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wholes = {face: _whole(folder / f"whole-{face}", face) for face in FACES}
        for count, (point, face) in enumerate(kinds):
            for number in [TERM, INT] if not short else [chance.choice([TERM, INT])]:
                here = folder / f"{count}-{number}"
                wrong += _once(here, point, face, (number,), wholes[face])
            pairs = [(TERM, TERM), (INT, INT), (TERM, INT), (INT, TERM)]
            for numbers in [pairs[count % 4]] if not short or count % 4 == 1 else []:
                took, found = _twice(folder / f"{count}-twice", point, face, numbers, wholes[face])
                wrong += found
                slowest, seconds = max(slowest, took), seconds + 1
    runs = len(kinds) * (1 if short else 2)
    return Result(
        "signal_in_training",
        f"SIGTERM or SIGINT at {len(POINTS)} points, {runs} runs; a second signal, {seconds} runs",
        f"{runs + seconds - len(wrong)}/{runs + seconds} as they must be (128 + signal, saved at the next boundary, "
        f"bitwise resume); second signal: gone after {slowest:.2f} s at most"
        + "".join(f"; {line}" for line in wrong[:4]),
        not wrong and slowest < 1,
    )


def _whole(here: Path, face: str) -> dict[str, Any]:
    here.mkdir()
    assert wait(fork(keep_final(here / "final.pt", face, here / "checkpoints")), 60) == 0
    return final(here / "final.pt")


def _start(here: Path, point: str, face: str, numbers: tuple[int, ...]) -> tuple[int, float, list[str]]:
    """(exit code, when it was gone, what the sender said)"""
    here.mkdir()
    read, write = os.pipe()

    def go() -> None:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sender, me = Sender(point, numbers, write), os.getpid()
        workers = 2 if point == "worker's fetch" else 0
        visit: Callable[[int], object] | None = (lambda index: sender.fetch(me, index)) if workers else None
        keep_final(
            here / "final.pt", face, here / "checkpoints", workers=workers, visit=visit, plugins=[sender]
        )()

    child = fork(go)
    os.close(write)
    code = wait(child, 60)
    gone = time.monotonic()
    with os.fdopen(read) as pipe:
        return code, gone, pipe.read().split("\n")


def _once(here: Path, point: str, face: str, numbers: tuple[int, ...], whole: dict[str, Any]) -> list[str]:
    code, _, said = _start(here, point, face, numbers)
    name = f"{signal.Signals(numbers[0]).name} at {point} ({face})"
    if code != 128 + numbers[0]:
        return [f"{name}: exit code {code}"]
    step, newest = int(said[0].split()[1]), checkpoint.latest_checkpoint(here / "checkpoints")
    if newest is None or (step >= 0 and not step <= checkpoint.step_of(newest) <= step + 1):
        return [f"{name}: sent at step {step}, newest checkpoint {newest and newest.name}"]
    return _resumed(here, name, face, whole)


def _twice(
    here: Path, point: str, face: str, numbers: tuple[int, ...], whole: dict[str, Any]
) -> tuple[float, list[str]]:
    code, gone, said = _start(here, point, face, numbers)
    name = f"{' then '.join(signal.Signals(n).name for n in numbers)} at {point} ({face})"
    # 1 is a KeyboardInterrupt; 128 + the first: it had been served before the second came
    if code not in (1, -numbers[1], 128 + numbers[1], 128 + numbers[0]):
        return 0.0, [f"{name}: exit code {code}"]
    second = next(float(line.split()[1]) for line in reversed(said) if line.startswith("second"))
    return gone - second, _resumed(here, name, face, whole)


def _resumed(here: Path, name: str, face: str, whole: dict[str, Any]) -> list[str]:
    code = wait(fork(keep_final(here / "final.pt", face, here / "checkpoints")), 60)
    if code != 0:
        return [f"{name}: resumed, it ended with {code}"]
    found = difference(final(here / "final.pt"), whole)
    return [] if found is None else [f"{name}: resumed, {found} differs"]


assert ACCUMULATION > 1, "else no signal comes inside a window"

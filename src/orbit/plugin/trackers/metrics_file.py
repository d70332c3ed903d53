"""The simplest tracker: a file of JSON lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core.files import replace_synced
from orbit.plugin.trackers.tracker import Tracker

if TYPE_CHECKING:
    from orbit.core.loop import Core


class MetricsFile(Tracker):
    """Keep numbers as JSON lines: `{"step": 10, "loss": 0.31, "grad_norm": 1.2, ...}`. NaN and infinity become null.

    A resumed run goes on in the same file: lines that were written after its checkpoint are taken away, so that the
    file is that of an uninterrupted run. A run that begins anew takes all away. Images have no place in it.

    Args:
        path: of the file; a relative one lies in the trainer's workspace, if it has one.
        interval: average over so many optimizer steps.

    >>> MetricsFile("metrics.jsonl").path.name
    'metrics.jsonl'
    """

    def __init__(self, path: Path | str = "metrics.jsonl", interval: int = 10) -> None:
        super().__init__(interval)
        self.path = Path(path)
        self._file: Any = None

    def begin(self, trainer: Core) -> None:
        path = trainer.in_workspace(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut_lines(path, trainer.step)
        self._file = path.open("a", encoding="utf-8")
        for row in self.written.rows if self.written.step == trainer.step else ():
            self.write(row, trainer.step)

    def write(self, records: dict[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in records.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def end(self) -> None:
        self._file.close()


def cut_lines(path: Path, step: int) -> None:
    """Take away the lines from this step on, and one that a kill cut short."""
    lines = path.read_text("utf-8", "replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) < step]
    if len(kept) < len(lines):
        replace_synced(path, "".join(kept).encode("utf-8"))


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) and line.endswith("\n") else math.inf

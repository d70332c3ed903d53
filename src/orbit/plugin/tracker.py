"""Where numbers and images go: one interface, and the simplest tracker, a file of JSON lines.

A tracker writes three things, all under the number of the optimizer step:

    trainer.log(records), log_images(records)    whatever it is given, nested names joined by "/"
    the means of every `interval` steps          unless a LoggingHook is there, which gives them to trainer.log
    trainer.metrics at an epoch's end            train_loss, val_loss, ...

Only the main process writes. A new tracker says how to `begin`, `write`, `write_images` and `end`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.files import replace_synced
from orbit.core.nested import as_number, flat
from orbit.plugin.logs import Interval, LoggingHook, check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Tracker(Plugin):
    """Base class of what keeps the numbers of a run.

    Args:
        interval: average over so many optimizer steps, >= 1.
    """

    priority = Plugin.MONITOR

    def __init__(self, interval: int = 10) -> None:
        self.interval = check_interval(type(self).__name__, interval)
        self._window: Interval | None = None
        self._open = False

    # -- to implement ----------------------------------------------------------------------------------------

    def begin(self, trainer: Core) -> None:
        """Open whatever is written to, at step `trainer.step`: not 0 if the run was resumed."""
        raise NotImplementedError

    def write(self, records: dict[str, float], step: int) -> None:
        """Numbers by name."""
        raise NotImplementedError

    def write_images(self, images: dict[str, Any], step: int) -> None:
        """Images by name, as `trainer.log_images` was given them. Left out where a tracker has no place for them."""

    def end(self) -> None:
        """Close it; runs on every way out."""
        raise NotImplementedError

    # -- events ----------------------------------------------------------------------------------------------

    def on_before_train(self, trainer: Core) -> None:
        logs = any(isinstance(hook, LoggingHook) for hook in trainer.hooks)
        self._window = None if logs else Interval(sync=runtime.world_size() > 1)
        if runtime.is_main_process() and not self._open:
            self.begin(trainer)
            self._open = True

    def on_after_step(self, trainer: Core) -> None:
        if self._window is None:
            return
        self._window.add(trainer)
        if trainer.step % self.interval == 0:
            self._log(self._window.flush(trainer), trainer.step)

    def on_after_epoch(self, trainer: Core) -> None:
        metrics = {f"epoch/{name}": value for name, value in trainer.metrics.items()}
        self._log({name: value for name, value in metrics.items() if isinstance(value, float)}, trainer.step)

    def on_log(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None:
        if not dry_run:
            self._log(records, trainer.step)

    def on_log_images(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None:
        if self._open and not dry_run:
            self.write_images(dict(flat(records)), trainer.step)

    def on_close(self, trainer: Core) -> None:
        if self._open:
            self._open = False
            self.end()

    def _log(self, records: Mapping[str, Any], step: int) -> None:
        if self._open and records:
            self.write({name: as_number(value, name) for name, value in flat(records)}, step)


class MetricsFile(Tracker):
    """Keep numbers as JSON lines: `{"step": 10, "loss": 0.31, "grad_norm": 1.2, ...}`. NaN and infinity become null.

    A resumed run goes on in the same file: lines of steps after the one it resumes from are taken away, so that the
    file is that of an uninterrupted run. Images have no place in it.

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
            _cut(path, trainer.step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: dict[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in records.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def end(self) -> None:
        self._file.close()


def _cut(path: Path, step: int) -> None:
    """Take away the lines of later steps, and one that a kill cut short."""
    lines = path.read_text("utf-8", "replace").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        replace_synced(path, "".join(kept).encode("utf-8"))


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf

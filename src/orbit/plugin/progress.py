"""How far the run is: document 003's line, or a bar on a terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.nested import flat
from orbit.plugin.logs import Interval, check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class ProgressHook(Plugin):
    """Print, every `interval` steps,

        Step   100/10000: step 0.2500s data 0.0100s eta 6:00:00 loss 0.5234 grad_norm 2.3456 lr_0 1.00e-03

    On a terminal the same figures stand behind a bar that stays in place.

    Args:
        interval: steps between two lines.
        with_records: also show what `forward` returned.
        sync: average over ranks before printing.
        eta_warmup: steps left out of the estimate, since the first ones are slow.
        console: where to print; only rank 0 does.
    """

    priority = Plugin.MONITOR

    def __init__(
        self,
        interval: int = 10,
        with_records: bool = False,
        sync: bool = False,
        eta_warmup: int = 10,
        console: Console | None = None,
    ) -> None:
        self.interval = check_interval("ProgressHook", interval)
        if eta_warmup < 0:
            raise ValueError(f"ProgressHook(eta_warmup={eta_warmup}): it must be >= 0 steps")
        self.eta_warmup = eta_warmup
        self.console = console
        self._window = Interval(with_records, sync)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._timed_from: tuple[int, float] | None = None
        self._steps_here = 0

    def on_before_train(self, trainer: Core) -> None:
        self.console = self.console or getattr(trainer, "console", None) or Console()
        self._steps_here, self._timed_from = 0, None
        if self.console.is_terminal and runtime.is_main_process():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "step", total=trainer.total_steps, completed=trainer.step, figures=""
            )

    def on_after_step(self, trainer: Core) -> None:
        self._window.add(trainer)
        self._steps_here += 1
        if self._timed_from is None and self._steps_here >= self.eta_warmup:
            self._timed_from = (trainer.step, time.perf_counter())
        last = trainer.step == trainer.total_steps
        if trainer.step % self.interval and not last:
            return
        figures = self._figures(trainer)
        if not runtime.is_main_process():
            return
        total = trainer.total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=trainer.step,
                description=f"step {trainer.step}/{total or '?'}",
                figures=figures,
            )
        elif self.console is not None:
            width = len(str(total)) if total else 6
            line = f"Step {trainer.step:>{width}}/{total or '?'}: {figures}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_close(self, trainer: Core) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _figures(self, trainer: Core) -> str:
        records = self._window.flush(trainer)
        head = f"step {records.pop('step_time'):.4f}s data {records.pop('data_time'):.4f}s eta {self._eta(trainer)}"
        return " ".join([head, *(f"{name} {_short(name, value)}" for name, value in flat(records))])

    def _eta(self, trainer: Core) -> str:
        if self._timed_from is None or trainer.total_steps is None or trainer.step == self._timed_from[0]:
            return "?"
        step, began = self._timed_from
        rate = (time.perf_counter() - began) / (trainer.step - step)
        return str(timedelta(seconds=round(rate * (trainer.total_steps - trainer.step))))


def _short(name: str, value: float) -> str:
    return f"{value:.2e}" if name.startswith("lr_") else f"{value:.4f}"

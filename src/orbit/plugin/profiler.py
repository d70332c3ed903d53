"""Where the time of a step goes: `torch.profiler` on a few steps of the run.

    step   1 … wait   wait+1 … wait+warmup   then `active` steps                     and again, `repeat` times
           ignored    traced, thrown away    traced → rank0_step_12.pt.trace.json

A trace opens in ui.perfetto.dev, chrome://tracing and TensorBoard's profiler. The table of the operations that took
longest is printed after each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from orbit.core import runtime
from orbit.core.base import at_least
from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Profiler(Plugin):
    """Trace `active` optimizer steps after `wait + warmup` others.

    Args:
        path: folder of the traces; a relative one lies in the trainer's workspace, if it has one.
        wait, warmup, active: optimizer steps, see above; warmup and active >= 1.
        repeat: how many traces, >= 1.
        shapes: record the operations' input shapes.
        memory: record what is allocated and freed.
        stack: record the lines of Python.
        memory_snapshot: also write `rank0_step_12.memory.pickle` of the CUDA allocator's history in these steps, for
            pytorch.org/memory_viz. The device must be CUDA.
        rows: of the printed table; 0 prints none.
        every_rank: trace all ranks, not the first alone.
        console: where to print.

    Raises:
        ValueError: a number outside its range; at the start of training, `memory_snapshot` elsewhere than on CUDA.

    Attributes:
        traces: files written by this plugin.
    """

    priority = Plugin.METER
    writes = True

    def __init__(
        self,
        path: Path | str = "profile",
        wait: int = 5,
        warmup: int = 2,
        active: int = 3,
        repeat: int = 1,
        shapes: bool = False,
        memory: bool = False,
        stack: bool = False,
        memory_snapshot: bool = False,
        rows: int = 15,
        every_rank: bool = False,
        console: Console | None = None,
    ) -> None:
        for name, value, least in (
            ("wait", wait, 0), ("warmup", warmup, 1), ("active", active, 1), ("repeat", repeat, 1), ("rows", rows, 0)
        ):  # fmt: skip
            at_least(name, value, least)
        self.path = Path(path)
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.shapes, self.memory, self.stack = shapes, memory, stack
        self.memory_snapshot, self.rows, self.every_rank = memory_snapshot, rows, every_rank
        self.console = console
        self.traces: list[Path] = []
        self._profile: Any = None
        self._cycles = 0

    def on_before_train(self, trainer: Core) -> None:
        if self.memory_snapshot and trainer.device.type != "cuda":
            raise ValueError(
                f"Profiler(memory_snapshot=True) on {trainer.device}: only CUDA's allocator keeps a history; "
                "use memory=True"
            )
        if not (self.every_rank or runtime.is_main_process()):
            return
        if self.memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._cycles = 0
        self._start(trainer)

    def _start(self, trainer: Core) -> None:
        """One profile a cycle: one that goes through several keeps all events, or warns that it does not."""
        from torch import profiler

        self._profile = profiler.profile(
            schedule=profiler.schedule(wait=self.wait, warmup=self.warmup, active=self.active, repeat=1),
            on_trace_ready=lambda profile: self._write(trainer, profile),
            record_shapes=self.shapes,
            profile_memory=self.memory,
            with_stack=self.stack,
        )
        self._profile.start()

    def on_after_step(self, trainer: Core) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        written = len(self.traces)
        profile.step()  # PyTorch crashes if one is stopped that raised while it began to record
        self._profile = profile
        if len(self.traces) > written:
            self._cycles += 1
            self._stop()
            if self._cycles < self.repeat:
                self._start(trainer)

    def on_close(self, trainer: Core) -> None:
        try:
            self._stop()
        finally:
            if self.memory_snapshot and trainer.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()  # writes what a cycle that was cut short has seen

    def _write(self, trainer: Core, profile: Any) -> None:
        workspace = getattr(trainer, "workspace", None)
        folder = self.path if self.path.is_absolute() or workspace is None else workspace / self.path
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"rank{runtime.rank()}_step_{trainer.step}"
        trace = folder / f"{stem}.pt.trace.json"
        profile.export_chrome_trace(str(trace))
        self.traces.append(trace)
        if self.memory_snapshot:
            self.traces.append(folder / f"{stem}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(self.traces[-1]))
        if self.rows and runtime.is_main_process():
            busiest = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
            table = profile.key_averages().table(sort_by=busiest, row_limit=self.rows)
            console = self.console or getattr(trainer, "console", None) or Console()
            console.print(f"{table}\n{trace}", highlight=False, markup=False, soft_wrap=True)

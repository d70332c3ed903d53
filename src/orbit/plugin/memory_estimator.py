"""Where the memory goes: parameters, gradients, optimizer state, activations; and how large a batch would fit.

`core/measuring/memory.py` has the equation. Activations are measured in the run's own first micro-batch, through which
autograd reports what it saves: no forward is added, no batch or random number drawn, and no bit of the result changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.measuring.memory import (
    Memory,
    Saved,
    memory_limit,
    optimizer_size,
    size_of,
    tensors_in,
    working_size,
)
from orbit.core.measuring.rehearsal import rehearsal
from orbit.core.nested import count_samples, map_nested_tensor
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class MemoryEstimator(Plugin):
    """Print what training keeps in memory, once two steps are done; on CUDA beside the peak that was measured.

    On CUDA, `trainer.log` is also given, every `interval` steps, `memory/allocated`, `memory/peak` (since the last
    time; beside CudaMaxMemoryHook, of the last step) and `memory/reserved` in GiB.

    Args:
        interval: optimizer steps between two lines of the log.
        verbose: print the report.
        console: where to print; only rank 0 does.

    Attributes:
        memory: a `Memory`, after the first micro-batch; its optimizer state is what the first step made, after it.
        measured_peak: bytes that torch's allocator had given out at most in the first two steps; None but on CUDA.

    Raises:
        ValueError: interval is under 1.
    """

    priority = Plugin.METER

    def __init__(self, interval: int = 100, verbose: bool = True, console: Console | None = None) -> None:
        self.interval = check_interval("MemoryEstimator", interval)
        self.verbose, self.console = verbose, console
        self.memory: Memory | None = None
        self.measured_peak: int | None = None
        self._trainer: Core | None = None
        self._batch: Any = None  # the first micro-batch: suggest_batch measures with a part of it
        self._saved: Saved | None = None
        self._sizes: list[int] = []  # what it saved
        self._steps = 0  # of this call of train()
        self._reported = False

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_build_model(self, trainer: Core) -> None:
        self._trainer = trainer

    def on_before_train(self, trainer: Core) -> None:
        self._steps = 0
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)

    def on_before_batch(self, trainer: Core) -> None:
        if self._batch is None:
            self._batch = trainer.batch
            self._saved = Saved([*trainer.model.buffers(), *tensors_in(trainer.batch)])
            self._saved.__enter__()

    def on_after_batch(self, trainer: Core) -> None:
        if self._saved is not None:
            for tensor in tensors_in(getattr(trainer, "output", None)):
                self._saved.add(tensor)
            self._sizes = self._end().sizes
            self.memory = _memory(trainer, self._batch, self._sizes)

    def on_after_step(self, trainer: Core) -> None:
        self._steps += 1
        if self._steps <= 2:
            self._look(trainer)
        if self._steps == 2:
            self._report(trainer)
        if trainer.device.type == "cuda" and trainer.step % self.interval == 0:
            records = {
                "allocated": torch.cuda.memory_allocated(trainer.device) / 2**30,
                "peak": torch.cuda.max_memory_allocated(trainer.device) / 2**30,
                "reserved": torch.cuda.memory_reserved(trainer.device) / 2**30,
            }
            torch.cuda.reset_peak_memory_stats(trainer.device)
            trainer.log({"memory": records}, dry_run=not runtime.is_main_process())

    def on_after_train(self, trainer: Core) -> None:
        self._report(trainer)

    def on_close(self, trainer: Core) -> None:
        if self._saved is not None:  # the first batch failed
            self._end()
            self._batch = None

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def report(self) -> Table:
        """What takes how much, for a rich console.

        Raises:
            RuntimeError: nothing has been measured yet.
        """
        memory = self.memory
        if memory is None:
            raise RuntimeError("MemoryEstimator: nothing is measured before the first micro-batch is done")
        table = Table("memory", "MiB")
        table.columns[1].justify = "right"
        rows = {
            "parameters": memory.parameters,
            "buffers": memory.buffers,
            "gradients": memory.gradients,
            "optimizer state": memory.optimizer,
            f"activations ({memory.samples} samples)": memory.activations,
            "the backward itself": memory.backward,
            "the micro-batch": memory.batch,
            "the optimizer's step": memory.working,
        }
        for name, size in rows.items():
            table.add_row(name, f"{size / 2**20:,.2f}")
        table.add_section()
        table.add_row("peak, estimated", f"{memory.peak / 2**20:,.2f}")
        if self.measured_peak is not None:
            table.add_row("peak, measured", f"{self.measured_peak / 2**20:,.2f}")
        return table

    def suggest_batch(self, limit: int | None = None, batch: Any = None, headroom: float = 0.1) -> int:
        """The largest micro-batch that fits, in samples; 0 if the model alone does not.

        Each tensor that is kept grows evenly with the batch, or not at all: measured for the run's first micro-batch
        and for half of it (a forward of its own that leaves no trace). Where no half can be computed (one sample, two
        or three with batch normalisation, several ranks) all count as growing, which rather suggests too little.

        Args:
            limit: bytes; None is what the trainer's device has for this process, less `headroom`.
            batch: a micro-batch as the loader gives it, to ask before training: then of a trainer that is built
                (`trainer.build()`), and with a forward of its own for the whole of it too.
            headroom: share of the device's memory left for fragments, libraries and other sizes of batches.

        Raises:
            RuntimeError: the trainer is not built, or there was no micro-batch yet and none is given.
            ValueError: a number outside its range, or the optimizer's state cannot be told before its first step.
        """
        trainer = self._trainer
        if trainer is None:
            raise RuntimeError(
                "MemoryEstimator.suggest_batch: call trainer.build() first, or ask after training"
            )
        if not 0 <= headroom < 1:
            raise ValueError(
                f"suggest_batch(headroom={headroom}): a share of the memory, at least 0 and under 1"
            )
        if limit is not None and limit <= 0:
            raise ValueError(f"suggest_batch(limit={limit}): it must be > 0 bytes")
        if batch is None and (self.memory is None or self._batch is None):
            raise RuntimeError(
                "MemoryEstimator.suggest_batch: nothing is measured yet; train a step, or give batch="
            )
        if optimizer_size(trainer.updater.optimizer) is None:
            kind = type(trainer.updater.optimizer).__name__
            raise ValueError(f"the state of {kind} cannot be told before its first step: train one, then ask")
        if batch is None:
            batch, sizes = self._batch, self._sizes
        else:
            sizes = _saved_sizes(trainer, batch)
        memory = _memory(trainer, batch, sizes)
        number, half = memory.samples, memory.samples // 2
        less = _saved_sizes(trainer, _first_rows(batch, number, half)) if half >= _fewest(trainer) else []
        if len(less) != len(sizes):
            half, less = 0, [0] * len(sizes)
        each = [max(0.0, (size - part) / (number - half)) for size, part in zip(sizes, less, strict=True)]

        def peak(samples: int) -> int:
            grown = [round(size + s * (samples - number)) for size, s in zip(sizes, each, strict=True)]
            return replace(_with(memory, grown), batch=round(memory.batch * samples / number)).peak

        room = math.floor(memory_limit(trainer.device) * (1 - headroom)) if limit is None else limit
        return _largest(peak, room)

    # ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────

    def _end(self) -> Saved:
        assert self._saved is not None
        saved, self._saved = self._saved, None
        saved.__exit__(None, None, None)
        return saved

    def _look(self, trainer: Core) -> None:
        if self.memory is not None:
            self.memory = _memory(trainer, self._batch, self._sizes)
        if trainer.device.type == "cuda":
            self.measured_peak = torch.cuda.max_memory_allocated(trainer.device)

    def _report(self, trainer: Core) -> None:
        if self.memory is None or self._reported:
            return
        self._reported = True
        if self.verbose and runtime.is_main_process():
            console = self.console or getattr(trainer, "console", None) or Console()
            console.print(self.report)


def _memory(trainer: Core, batch: Any, sizes: list[int]) -> Memory:
    optimizer = trainer.updater.optimizer
    own = list(trainer.model.parameters())
    fixed = Memory(
        parameters=size_of(own),
        buffers=size_of(trainer.model.buffers()),
        gradients=size_of([p for p in own if p.requires_grad]),
        optimizer=optimizer_size(optimizer) or 0,
        activations=0,
        backward=0,
        batch=size_of(tensors_in(batch)),
        working=working_size(optimizer),
        samples=count_samples(batch),
        accumulates=trainer.gradient_accumulation_steps > 1,
    )
    return _with(fixed, sizes)


def _with(memory: Memory, sizes: list[int]) -> Memory:
    return replace(memory, activations=sum(sizes), backward=2 * max(sizes, default=0))


def _largest(peak: Callable[[int], int], room: int) -> int:
    """The largest number of samples, up to 2**30, whose peak has room."""
    fits, beyond = 0, 2**30 + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if peak(middle) <= room else (fits, middle)
    return fits


def _saved_sizes(trainer: Core, batch: Any) -> list[int]:
    """Bytes of every tensor that the forward of a batch keeps."""
    with Saved([*trainer.model.buffers(), *tensors_in(batch)]) as saved, rehearsal(trainer, batch):
        for tensor in tensors_in(getattr(trainer, "output", None)):
            saved.add(tensor)
    return saved.sizes


def _fewest(trainer: Core) -> int | float:
    """Samples that a half must have to be computed."""
    if runtime.world_size() > 1:
        return math.inf
    norms = (nn.modules.batchnorm._BatchNorm,)
    return 2 if any(isinstance(module, norms) for module in trainer.model.modules()) else 1


def _first_rows(batch: Any, rows: int, wanted: int) -> Any:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[:wanted] if tensor.ndim and tensor.shape[0] == rows else tensor

    return map_nested_tensor(cut, batch)

"""What the tests of logging hooks and trackers run on every rank (and, with one, in the test's own process)."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from orbit.core import Outcome, Plugin, runtime
from orbit.engine import Engine
from orbit.plugin import (
    Board,
    CheckpointingHook,
    ImageFileLoggerHook,
    LoggingHook,
    MetricsFile,
    ProgressHook,
)
from orbit.trainer import BaseTrainer


class Trainer(BaseTrainer):
    """Wraps its model itself. Every rank has its own data, in micro-batches of 1, 2, 3, ... units.

    Rank 0 has a record of every micro-batch, and rank 1 has others, of every other micro-batch.
    """

    def __init__(
        self, hooks: list[Plugin], steps: int, units: list[int], workspace: Path | None = None
    ) -> None:
        super().__init__(steps, device="cpu", gradient_accumulation_steps=2, workspace=workspace)
        self.own, self.units, self.mute = hooks, units, False
        self.told: list[tuple[dict[str, Any], bool]] = []
        self.told_at: list[tuple[int, float]] = []
        self.steps: list[list[tuple[float, float]]] = [[]]  # loss and weight of every micro-batch of a step

    def build_data_loader(self) -> Any:
        generator = torch.Generator().manual_seed(runtime.rank())
        batches: Any = [torch.randn(units, 4, generator=generator) for units in self.units]
        return DataLoader(batches, batch_size=1, collate_fn=lambda samples: samples[0])

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        return DistributedDataParallel(model) if runtime.world_size() > 1 else model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), 0.1)

    def build_hooks(self) -> list[Plugin]:
        return self.own

    def forward(self, input: Tensor) -> Outcome:
        loss, weight = self.model(input).square().mean(), float(len(input))
        if len(self.steps[-1]) == 2:
            self.steps.append([])
        self.steps[-1].append((loss.item(), weight))
        if self.mute:
            return Outcome(loss, weight)
        if runtime.is_main_process():
            return Outcome(loss, weight, {"zero": {"units": weight}})
        return Outcome(loss, weight, {"one": weight} if len(self.steps[-1]) == 1 else {})

    def log(self, records: dict[str, Any], dry_run: bool = False) -> None:
        self.told.append((records, dry_run))
        self.told_at.append((self.step, records["loss"]))


def units_of(rank: int) -> list[int]:
    return [1, 4, 2, 3, 5, 1, 3, 2] if rank == 0 else [6, 1, 1, 9, 2, 2, 7, 3]


def logged(sync: bool, mute: bool = False) -> tuple[Any, Any]:
    """What LoggingHook told every two steps, and the micro-batches of every step."""
    trainer = Trainer([LoggingHook(2, sync=sync)], 4, units_of(runtime.rank()))
    trainer.mute = mute
    trainer.train()
    return trainer.told, trainer.steps


def printed(sync: bool) -> tuple[str, Any]:
    """What ProgressHook printed, and the micro-batches of every step."""
    console = Console(file=StringIO(), width=400)
    hook = ProgressHook(interval=2, with_records=True, sync=sync, eta_warmup=1, console=console)
    trainer = Trainer([hook], 4, units_of(runtime.rank()))
    trainer.train()
    return console.file.getvalue(), trainer.steps  # type: ignore[attr-defined]


def resumed(folder: str, steps: int) -> Any:
    """What LoggingHook tells every three steps of a run that is saved every two, and the micro-batches of each."""
    workspace = Path(folder)
    saves = CheckpointingHook(2, path="saved", exit_signals=[])
    trainer = Trainer(
        [LoggingHook(3), MetricsFile("metrics.jsonl"), saves], steps, units_of(runtime.rank()), workspace
    )
    trainer.train()
    return trainer.told_at, trainer.steps


def padded() -> list[dict[str, Any]]:
    """Records of an epoch of three samples, one a batch."""
    told: list[dict[str, Any]] = []

    class Keeps(Plugin):
        def on_log(self, trainer: Any, records: dict[str, Any], dry_run: bool) -> None:
            told.append({"x": records["x"]})

    def forward(engine: Engine, data: Tensor, target: Any) -> tuple[Tensor, dict[str, Any]]:
        return engine.model(data).square().mean(), {"x": data.mean()}

    model = nn.Linear(1, 1)
    engine = Engine(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        plugins=[LoggingHook(2), Keeps()],
        forward_step=forward,
        device="cpu",
        parallel="ddp",
    )
    samples: Any = [torch.tensor([float(number)]) for number in range(3)]
    for _ in engine.train(DataLoader(samples, batch_size=1), num_epochs=1):
        engine.auto_update()
    return told


class Stream(IterableDataset[Tensor]):
    """Of unknown length, and another one on every rank."""

    def __iter__(self) -> Any:
        for number in range(9 - 4 * runtime.rank()):
            yield torch.full((4,), float(number))


def ends_early() -> int:
    """Steps of an epoch whose data ends earlier on rank 1, under every hook that averages over ranks."""
    model = nn.Linear(4, 1)
    hooks = [LoggingHook(2), ProgressHook(3, sync=True, console=Console(file=StringIO()))]
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), 0.1), plugins=hooks, device="cpu", parallel="ddp"
    )
    for _ in engine.train(DataLoader(Stream(), batch_size=1), num_epochs=1):
        engine.update(engine.model(engine.data).square().mean())
    return engine.global_step


def tracked(folder: str) -> list[str]:
    """The files that a rank writes into its workspace."""
    mine = Path(folder) / str(runtime.rank())

    class Says(Plugin):
        def on_before_step(self, trainer: Any) -> None:
            trainer.log({"loss": trainer.step})
            trainer.log_images({"x": np.zeros((2, 2), np.uint8)})

    hooks = [MetricsFile(interval=2), ImageFileLoggerHook(1), Board(interval=2), Says()]
    Trainer(hooks, 2, units_of(runtime.rank()), mine).train()
    return sorted(path.name.split(".")[0] for path in mine.rglob("*") if path.is_file())

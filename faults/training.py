"""A run that has everything whose state could be lost, as the cases of training need it: 4 s of steps at most.

Shuffled data, dropout, batch norm, AdamW, a scheduler, loss scaling, accumulation over 3, EMA, a warm-up, evaluation at
every epoch's end, a checkpoint every two steps; by `Engine` or by `BaseTrainer`, with or without workers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from orbit.core import Core, Outcome, Plugin, seed_everything
from orbit.engine import Engine
from orbit.plugin import EMA, CheckpointingHook, LoggingHook, Warmup
from orbit.trainer import BaseTrainer

SAMPLES, BATCH, ACCUMULATION, STEPS, EPOCHS = 52, 4, 3, 20, 4  # 13 micro-batches an epoch
FACES = ("Engine", "BaseTrainer")


class Data(Dataset[Any]):
    """Three classes of points. `visit(index)` is called where a sample is fetched, in a worker if there are any."""

    def __init__(self, visit: Callable[[int], object] | None = None) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 8, generator=generator)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()
        self.visit = visit

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.visit is not None:
            self.visit(index)
        return self.x[index], self.y[index]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def optimizer(of: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(of.parameters(), lr=1e-2)


def scheduler(of: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(of, T_max=40)


def train(
    face: str,
    folder: Path | None,
    *,
    workers: int = 0,
    plugins: list[Plugin] | None = None,
    body: Callable[[Core], object] | None = None,
    visit: Callable[[int], object] | None = None,
    state: dict[str, Any] | None = None,
    scaled: bool = True,
    **options: Any,
) -> Core:
    """Train to the end, from the newest checkpoint in `folder` (or from `state`), and return the trainer.

    Args:
        plugins: beside those above.
        body: called in the body of every micro-batch, before its forward.
        visit: see `Data`.
        scaled: train in fp16 with a loss scale.
        options: of the DataLoader.
    """
    torch.set_num_threads(1)
    seed_everything(11)
    data = DataLoader(Data(visit), batch_size=BATCH, shuffle=True, num_workers=workers, **options)
    hooks: list[Plugin] = [EMA(0.9), Warmup(5), LoggingHook(3), Growth(), *(plugins or [])]
    if folder is not None:
        hooks.append(CheckpointingHook(interval=2, path=folder))
    make = by_engine if face == "Engine" else by_trainer
    trainer, go = make(data, hooks, body or (lambda trainer: None), "fp16" if scaled else None)
    if state is not None:
        trainer.load_state_dict(state)
    go()
    return trainer


def by_engine(
    data: Any, hooks: list[Plugin], body: Callable[[Core], object], precision: str | None
) -> tuple[Core, Callable[[], None]]:
    module = model()
    of = optimizer(module)
    engine = Engine(
        module, of, nn.CrossEntropyLoss(), scheduler(of), hooks, device="cpu", mixed_precision=precision,
        grad_clip_norm=0.5, gradient_accumulation_steps=ACCUMULATION, max_non_finite_grad_retries=2,
    )  # fmt: skip

    def go() -> None:
        for _ in engine.train(data, num_epochs=EPOCHS):
            body(engine)
            engine.auto_update()
            if engine.is_epoch_end:
                for _ in engine.eval(DataLoader(Data(), batch_size=26)):
                    engine.auto_update()

    return engine, go


class Trainer(BaseTrainer):
    def __init__(
        self, data: Any, hooks: list[Plugin], body: Callable[[Core], object], precision: str | None
    ) -> None:
        super().__init__(
            STEPS - 3, device="cpu", mixed_precision=precision, grad_clip=0.5, gradient_accumulation_steps=ACCUMULATION,
            max_non_finite_grad_retries=2,
        )  # fmt: skip
        self.data, self.given, self.body = data, [*hooks, Evaluate()], body

    def build_data_loader(self) -> Any:
        return self.data

    def build_model(self) -> nn.Module:
        return model()

    def build_optimizer(self) -> torch.optim.Optimizer:
        return optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return scheduler(self.optimizer)

    def build_hooks(self) -> list[Plugin]:
        return self.given

    def forward(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        self.body(self)
        x, y = input
        return F.cross_entropy(self.model(x), y), {}


def by_trainer(
    data: Any, hooks: list[Plugin], body: Callable[[Core], object], precision: str | None
) -> tuple[Core, Callable[[], None]]:
    trainer = Trainer(data, hooks, body, precision)
    return trainer, trainer.train


class Growth(Plugin):
    """A loss scale that grows soon, and overflows now and then: its state matters."""

    def on_before_train(self, trainer: Any) -> None:
        if trainer.grad_scaler is not None:
            trainer.grad_scaler.set_growth_interval(3)


class Evaluate(Plugin):
    """What the body of the other face does at an epoch's end."""

    def on_after_epoch(self, trainer: Any) -> None:
        for _ in trainer.eval(DataLoader(Data(), batch_size=26)):
            x, y = trainer.batch
            trainer.step_on(Outcome(F.cross_entropy(trainer.model(x), y)))


def keep_final(path: Path, face: str, folder: Path, **how: Any) -> Callable[[], None]:
    """Work for a forked process: train, and write the whole state to `path`."""
    return partial(_train_and_keep, path, face, folder, how)


def _train_and_keep(path: Path, face: str, folder: Path, how: dict[str, Any]) -> None:
    torch.save(train(face, folder, **how).state_dict(), path)


def final(path: Path) -> dict[str, Any]:
    """What was kept; the seconds that steps took are left out."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    for columns in state["LoggingHook(3)"]:
        columns[:] = [column for column in columns if column[0] not in (["step_time"], ["data_time"])]
    return state

"""A run that saves at every step, as the cases of saving need it: quick, and with files of a megabyte or two."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from orbit.core import Plugin
from orbit.plugin import CheckpointingHook
from orbit.trainer import BaseTrainer

WIDTH = 256  # two layers of it: 132,096 parameters, 1.6 MB with AdamW's moments


class Saving(BaseTrainer):
    """`steps` steps; `told` is the writing end of a pipe that gets a line for every checkpoint that is on the disk."""

    def __init__(self, folder: Path, steps: int = 10_000, told: int | None = None, **options: Any) -> None:
        super().__init__(steps, device="cpu")
        self.hook = CheckpointingHook(interval=1, path=folder, **options)
        self.told = told

    def build_data_loader(self) -> Any:
        return DataLoader(torch.arange(14.0)[:, None].expand(-1, WIDTH), batch_size=2)  # type: ignore[arg-type]

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def build_hooks(self) -> list[Plugin]:
        return [self.hook, *([] if self.told is None else [_Acknowledged(self.hook, self.told)])]

    def forward(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.model(input).square().mean(), {}


class _Acknowledged(Plugin):
    """Behind the checkpoints: tells the newest step that the hook says is on the disk."""

    priority = 1000

    def __init__(self, hook: CheckpointingHook, told: int) -> None:
        self.hook, self.told = hook, told

    def on_after_step(self, trainer: Any) -> None:
        if self.hook.acknowledged is not None:
            os.write(self.told, f"{self.hook.acknowledged}\n".encode())


def lines(read: int) -> Iterator[str]:
    """Whole lines from a pipe until its writer is gone."""
    with os.fdopen(read) as pipe:
        for line in pipe:
            if line.endswith("\n"):
                yield line.strip()

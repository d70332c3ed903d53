"""Tiny real things that many tests share: data, a model with dropout and batch norm, and its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from orbit.core import Plugin
from orbit.trainer import BaseTrainer


def dataset(samples: int = 50) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def loader(samples: int = 50, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset(samples), batch_size=batch_size, shuffle=True, **options)


def model(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
        )


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def scheduler(of: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(of, T_max=40)


def same(left: nn.Module, right: nn.Module) -> bool:
    """Bit for bit, parameters and buffers."""
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


class Trainer(BaseTrainer):
    """The tiny model under BaseTrainer; `plugins=` become its hooks."""

    def __init__(
        self, max_steps: int = 14, plugins: list[Plugin] | None = None, data: Any = None, **options: Any
    ) -> None:
        super().__init__(max_steps, device="cpu", **options)
        self.given, self.data = plugins or [], data

    def build_data_loader(self) -> Any:
        return loader() if self.data is None else self.data

    def build_model(self) -> nn.Module:
        return model().to(self.device)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return scheduler(self.optimizer)

    def build_hooks(self) -> list[Plugin]:
        return self.given

    def forward(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        x, y = input
        logits = self.model(x)
        return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}

"""What the plugin laws run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard
import torchmetrics  # noqa: F401 (what plugins import when they begin: here once for all ranks)
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from orbit.core import runtime
from orbit.engine import Engine
from orbit.plugin import Plugin
from tests import tiny
from tests.laws.plugins import PACKAGES, PLUGINS

NAMES = [name for name in PLUGINS if name not in PACKAGES]


class Trainer(tiny.Trainer):
    """Document 003's way: the model is wrapped and the data dealt out by the user."""

    def build_data_loader(self) -> Any:
        return DataLoader(tiny.dataset(), batch_size=4, sampler=DistributedSampler(tiny.dataset(), seed=3))

    def build_model(self) -> nn.Module:
        return nn.parallel.DistributedDataParallel(super().build_model())


def run(face: str, names: list[str], folder: str, steps: int, state: Any = None) -> dict[str, Any]:
    """The state of every rank after `steps`, with an evaluation after each third of them."""
    plugins: list[Plugin] = [PLUGINS[name](Path(folder)) for name in names]
    torch.manual_seed(5 + runtime.rank())  # dropout of its own on every rank
    if face == "trainer":
        trainer: Any = Trainer(max_steps=steps, plugins=plugins)
    else:
        model = tiny.model()
        optimizer = tiny.optimizer(model)
        trainer = Engine(
            model,
            optimizer,
            nn.CrossEntropyLoss(),
            tiny.scheduler(optimizer),
            plugins,
            device="cpu",
            parallel="ddp",
        )
    if state is not None:
        trainer.load_state_dict(state)
    if face == "trainer":
        trainer.train()
    else:
        for _ in trainer.train(tiny.loader(batch_size=4), max_steps=steps):
            trainer.auto_update()
            if trainer.step % 3 == 0:
                for _ in trainer.eval(tiny.loader(20)):
                    trainer.auto_update()
    return trainer.state_dict()


def laws(face: str, folder: str) -> dict[str, Any]:
    """All plugins in both orders, one run that is resumed from another's state, and every plugin alone."""
    names = [
        name for name in NAMES if not (face == "trainer" and name == "LoRA")
    ]  # wrapped before it could change
    return {
        "first": run(face, names, f"{folder}/first", 7)["model"],
        "last": run(face, names[::-1], f"{folder}/last", 7)["model"],
        "resumed": run(face, names, f"{folder}/resumed", 7, run(face, names, f"{folder}/half", 3))["model"],
    }

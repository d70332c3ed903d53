"""A run that logs all that a tracker may be given, under either face; a checkpoint, a kill and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import CheckpointingHook, Plugin
from tests import tiny

PICTURE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
FACES = ("engine", "trainer")


class Killed(Exception):
    """What ends a run in the middle."""


class Says(Plugin):
    """Named losses before every step, a picture before every other; raises at a step."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == self.dies_at:
            raise Killed
        trainer.log({"parts": {"ce": torch.tensor(trainer.step + 0.5), "kl": trainer.step / 4}})
        if trainer.step % 2 == 0:
            trainer.log_images({"seen": {"x": PICTURE}})


class Trainer(tiny.Trainer):
    """Named losses of its own."""

    def forward(self, input: Any) -> Any:
        loss, records = super().forward(input)
        return loss, {"losses": {"ce": loss, "twice": 2 * loss.detach()}, **records}


def train(face: str, folder: Path, hooks: list[Plugin], steps: int = 6, dies_at: int | None = None) -> Any:
    """Train for so many steps; every fourth is saved in the folder, and a run that finds a checkpoint goes on from it.

    An epoch is seven steps. Raises Killed if it dies.
    """
    torch.manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    saves = CheckpointingHook(4, path=folder / "checkpoints", exit_signals=[])
    plugins = [*hooks, Says(dies_at), saves]
    if face == "trainer":
        trainer = Trainer(steps, plugins, workspace=folder)
        trainer.train()
        return trainer
    model = tiny.model()
    engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=plugins, device="cpu")
    with engine:
        for _ in engine.train(tiny.loader(), max_steps=steps):
            engine.auto_update()
    return engine

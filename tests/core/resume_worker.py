"""Runs in processes of their own, which may kill themselves.

Reads lines `FACE WORKERS FOLDER AT SIGNAL`. For each it forks a process that trains the tiny model (dropout, batch
norm) on a shuffled loader with accumulation 3, saves every two steps, resumes from FOLDER if there is something, and
writes the final weights to FOLDER/final.pt; in the body of micro-batch AT (0 for never) it sends itself SIGNAL.
Prints `exit code N`.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer imports: here, and not in every process
from torch import nn

from orbit.core import seed_everything
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook, GradientAccumulation, LoggingHook
from tests import tiny

EPOCHS, SAMPLES, BATCH, ACCUMULATION = 4, 52, 4, 3  # 13 micro-batches: windows of 3, 3, 3, 3, 1 under Engine


def run(face: str, workers: int, folder: Path, kill_at: int, number: int) -> None:
    torch.set_num_threads(1)
    seed_everything(11)
    seen = 0

    def perhaps_die() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), number)

    loader = tiny.loader(SAMPLES, BATCH, num_workers=workers)
    checkpoints = CheckpointingHook(interval=2, path=folder / "checkpoints")
    module: nn.Module
    if face == "engine":
        module = tiny.model()
        optimizer = tiny.optimizer(module)
        engine = Engine(
            module, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), device="cpu", grad_clip_norm=0.5,
            plugins=[checkpoints, GradientAccumulation(ACCUMULATION), LoggingHook(3)],
        )  # fmt: skip
        validation = tiny.loader(20)
        for _ in engine.train(loader, num_epochs=EPOCHS):
            perhaps_die()
            engine.auto_update()
            if engine.is_epoch_end:
                for _ in engine.eval(validation):
                    engine.auto_update()
    else:

        class Dying(tiny.Trainer):
            def forward(self, input: Any) -> Any:
                perhaps_die()
                return super().forward(input)

        trainer = Dying(
            max_steps=17,
            plugins=[checkpoints],
            data=loader,
            grad_clip=0.5,
            gradient_accumulation_steps=ACCUMULATION,
        )
        trainer.train()
        module = trainer.model
    torch.save(module.state_dict(), folder / "final.pt")


def in_a_process(face: str, workers: str, folder: str, at: str, number: str) -> int:
    """Fork, run there, and say how it ended, as `subprocess` does."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(face, int(workers), Path(folder), int(at), int(number))
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print("exit code", in_a_process(*line.split()), flush=True)

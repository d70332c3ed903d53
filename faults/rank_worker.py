"""One rank of `lost_rank`: trains and, in its first life, does what it is told to at a step."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orbit.core.events import Plugin
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook


class Deed(Plugin):
    """On rank 1, in the backward of the first life's step: die, raise, or answer no more."""

    def __init__(self, deed: str, step: int) -> None:
        self.deed, self.step = deed, step

    def on_after_batch(self, trainer: Any) -> None:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if not (first and dist.get_rank() == 1 and trainer.step == self.step and trainer.window_open):
            return
        if self.deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.deed == "raise":
            raise RuntimeError("rank 1 raises, as it was told to")
        elif self.deed == "hang":
            time.sleep(3600)


def main(folder: Path, deed: str, step: int, seed: int) -> None:
    with (folder / "started").open("a") as file:
        file.write(f"{os.getpid()} {os.environ['TORCHELASTIC_RESTART_COUNT']}\n")
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 3))
    made = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(96, 8, generator=made), torch.randint(0, 3, (96,), generator=made))
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        nn.CrossEntropyLoss(),
        plugins=[CheckpointingHook(interval=3, path=folder / "checkpoints"), Deed(deed, step)],
        gradient_accumulation_steps=2,
        parallel="ddp",
        device="cpu",
    )
    torch.manual_seed(seed + dist.get_rank())  # dropout of its own on every rank
    for _ in engine.train(DataLoader(data, batch_size=4, shuffle=True), max_steps=16):
        engine.auto_update()
    if dist.get_rank() == 0:
        torch.save(engine.unwrapped_model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

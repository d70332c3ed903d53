"""One script, one process or many: the losses are the same.

    python examples/06_ranks.py
    torchrun --nproc-per-node 2 examples/06_ranks.py ddp
    torchrun --nproc-per-node 2 examples/06_ranks.py fsdp

Kill it at any time and start it again, on as many processes as you like: it goes on where it stood, with the same data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orbit import Engine, seed_everything
from orbit.plugin import CheckpointingHook, ProgressHook

RANKS = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun says it
TOGETHER = 24  # samples in a step, over all ranks


class Block(nn.Module):
    """One of the model's equal blocks: what "fsdp" cuts up one at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def main(parallel: str | None, workspace: Path) -> None:
    seed_everything(0)
    x = torch.rand(600, 2) * 2 - 1
    y = (x.norm(dim=1) < 0.8).long()  # inside the circle?
    model = nn.Sequential(nn.Linear(2, 32), nn.Sequential(*(Block(32) for _ in range(3))), nn.Linear(32, 2))
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=3e-3),
        nn.CrossEntropyLoss(),
        plugins=[
            ProgressHook(interval=25, sync=True),
            CheckpointingHook(interval=25, path=workspace.absolute()),
        ],
        parallel=parallel,
        device="cpu",
    )
    loader = DataLoader(
        TensorDataset(x, y), batch_size=TOGETHER // RANKS, shuffle=True
    )  # dealt out to the ranks
    for _ in engine.train(loader, num_epochs=4):
        engine.auto_update()
    engine.print(f"train_loss {engine.metrics['train_loss']:.6f} after {engine.global_step} steps")


if __name__ == "__main__":
    main(sys.argv[1] if RANKS > 1 else None, Path(os.environ.get("WORKSPACE", "runs/ranks")))

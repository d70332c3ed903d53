"""What the tests of optimizers run on every rank (and, with one, in the test's own process)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orbit.core import runtime
from orbit.engine import Engine
from orbit.optim import SAM, Muon
from orbit.plugin import CheckpointingHook

TOGETHER = 12  # samples of all ranks in a window


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(x)))
        return x + torch.einsum("bi,eij->bj", x, self.experts)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


OPTIMIZERS: dict[str, Any] = {
    "sam": lambda m: SAM(m.parameters(), torch.optim.AdamW, rho=0.1, lr=1e-2),
    "asam": lambda m: SAM(m.parameters(), torch.optim.SGD, rho=0.5, adaptive=True, lr=1e-2, momentum=0.9),
    "muon": lambda m: Muon.for_model(m, lr=0.01, adamw_lr=1e-2),
}


def run(name: str, parallel: Any, micro: int, steps: int = 4, folder: str | None = None) -> dict[str, Any]:
    """`steps` windows of 12 samples, each in `micro` micro-batches a rank."""
    torch.manual_seed(0)
    model = Net().double()
    plugins = [] if folder is None else [
        CheckpointingHook(interval=2, path=Path(folder), keep_previous=None, exit_signals=[])
    ]  # fmt: skip
    made = torch.Generator().manual_seed(3)
    x = torch.randn(48, 8, generator=made, dtype=torch.float64)
    data = TensorDataset(x, torch.randint(0, 3, (48,), generator=made))
    engine = Engine(
        model,
        OPTIMIZERS[name](model),
        nn.CrossEntropyLoss(),
        plugins=plugins,
        parallel=parallel if runtime.world_size() > 1 else None,
        device="cpu",
        grad_clip_norm=0.5,
        gradient_accumulation_steps=micro,
    )
    loader = DataLoader(data, batch_size=TOGETHER // runtime.world_size() // micro)
    for _ in engine.train(loader, max_steps=steps):
        engine.auto_update()
    state = engine.state_dict()
    return {"model": state["model"], "moments": state["optimizer"]["state"], "step": engine.step}

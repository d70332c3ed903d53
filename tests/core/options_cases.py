"""What the tests of the run's options in several processes run on every rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orbit.core import runtime
from orbit.core.ranks import shards
from orbit.engine import Engine
from orbit.plugin import GarbageCollection, GradientStats, Plugin, Throughput
from tests.core.parallel_cases import Net, data
from tests.core.test_split import ROWS, ByRow, Gradients, Limited, batches


class Counted(Limited):
    """Rank r adds r + 1 to a buffer at every forward: DDP sends rank 0's round."""

    def __init__(self, most: int, where: str) -> None:
        super().__init__(most, where)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0 + runtime.rank())
        return super().forward(x)


def split(where: str, accumulation: int, guarded: bool) -> dict[str, Any]:
    """Under DDP; where guarded, rank 0 has memory for three rows and rank 1 for all."""
    gradients = Gradients()
    model = Counted(3 if guarded and runtime.rank() == 0 else ROWS, where)
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), ByRow(), plugins=[gradients], device="cpu",
        gradient_accumulation_steps=accumulation, parallel="ddp", split_on_oom=guarded,
    )  # fmt: skip
    engine.logger.setLevel("ERROR")
    for _ in engine.train([batch for i, batch in enumerate(batches(12)) if i % 2 == runtime.rank()]):
        engine.auto_update()
    return {
        "gradients": [g.numpy() for g in gradients.seen],
        "tried": model.tried,
        "loss": engine.metrics["train_loss"],
    }


def refused() -> str:
    model = Net()
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), 0.1), device="cpu", parallel="fsdp", split_on_oom=True
    )
    try:
        engine.build()
    except ValueError as error:
        return str(error)
    return "built"


class Logged(Plugin):
    def __init__(self) -> None:
        self.records: list[Any] = []

    def on_log(self, trainer: Any, records: dict[str, Any], dry_run: bool) -> None:
        self.records.append((records, dry_run))


def looked_at(parallel: str | None, **options: Any) -> dict[str, Any]:
    """A run with plugins that look at it, a range test before it, blocks checkpointed; with two ranks or none."""
    torch.manual_seed(1)
    model = Net()
    logged = Logged()
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(),
        plugins=[GradientStats(2, per_layer=2), logged, GarbageCollection(2), Throughput(2)],
        device="cpu", parallel=parallel, **options,
    )  # fmt: skip
    ranks = runtime.world_size()
    loader = torch.utils.data.DataLoader(data(48), batch_size=12 // ranks)
    found = engine.lr_find(loader, steps=10, min_lr=1e-3)
    engine.run(loader)
    weights = {
        name: (value.full_tensor() if shards.is_sharded(value) else value).clone()
        for name, value in engine.unwrapped_model.state_dict().items()
    }
    return {
        "found": (found.lrs, found.losses),
        "records": [records["gradients"] for records, _ in logged.records],
        "dry": {dry for _, dry in logged.records},
        "weights": weights,
        "throughput": sorted(engine.step_info.keys() & {"samples_per_second", "tflops"}),
    }


def splits() -> dict[Any, Any]:
    return {
        (where, accumulation): (split(where, accumulation, False), split(where, accumulation, True))
        for where in ("forward", "backward")
        for accumulation in (1, 3)
    }


def twice(parallel: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return looked_at(parallel), looked_at(parallel, activation_checkpointing=True)

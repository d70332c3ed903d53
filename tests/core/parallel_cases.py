"""What the tests of several processes run on every rank (and, with one, in the test's own process)."""

from __future__ import annotations

import math
import os
import resource
import signal
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.ranks import shards
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook
from orbit.trainer import BaseTrainer

TOGETHER = 12  # samples of all ranks in a micro-batch


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def data(samples: int = 50) -> TensorDataset:
    made = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 8, generator=made)
    return TensorDataset(x, torch.randint(0, 3, (samples,), generator=made))


class Losses(Plugin):
    """The loss of every step, over all ranks."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_after_step(self, trainer: Any) -> None:
        mean = trainer.step_info["loss"]
        weight = len(trainer.batch[1]) if not trainer.is_padding else 0
        pairs = [(mean.item() if mean is not None else 0.0, float(weight))]
        if trainer.team is not None:
            from orbit.core.ranks import everyones

            pairs = [pair for part in everyones(pairs) for pair in part]
        self.seen.append(math.fsum(loss * w for loss, w in pairs) / math.fsum(w for _, w in pairs))


def engine(parallel: Any, plugins: list[Any], model: nn.Module | None = None, **kwargs: Any) -> Engine:
    torch.manual_seed(0)
    model = Net() if model is None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    options: dict[str, Any] = {"grad_clip_norm": 1.0, "device": "cpu", **kwargs}
    return Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        plugins=plugins,
        parallel=parallel if runtime.world_size() > 1 else None,
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=TOGETHER // runtime.world_size(), shuffle=True)


def train(
    parallel: str, folder: str | None, steps: int, adapters: bool = False, at: int | None = None, **hook: Any
) -> dict[str, Any]:
    """Losses of the steps trained here, and the whole model and optimizer after them (or after step `at`)."""
    losses, plugins = Losses(), list[Plugin]()
    if folder is not None:
        plugins.append(
            CheckpointingHook(interval=5, path=Path(folder), keep_previous=None, exit_signals=[], **hook)
        )
    if adapters:
        from orbit.plugin import LoRA

        plugins.append(LoRA(target_names=["up", "down"], r=2, alpha=4))
    run = engine(parallel, [losses, *plugins], gradient_accumulation_steps=1)
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=steps):
        run.auto_update()
        if run.step == at:
            state = deepcopy(run.state_dict())
    if at is None or not losses.seen:
        state = run.state_dict()
    return {
        "losses": losses.seen,
        "model": state["model"],
        "optimizer": state["optimizer"]["state"],
        "step": run.step,
        "metrics": dict(run.metrics),
        "trains": sum(p.requires_grad for p in run.model.parameters()),
        "pid": os.getpid(),
    }


def train_beside(folder: str) -> dict[str, Any]:
    return train("fsdp", folder, 10, asynchronous=True)


def different(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two models and their optimizers."""
    assert one["model"].keys() == other["model"].keys()
    pairs = [(value, other["model"][key]) for key, value in one["model"].items()]
    assert one["optimizer"].keys() == other["optimizer"].keys()
    for number, entries in one["optimizer"].items():
        pairs += [(value, other["optimizer"][number][name]) for name, value in entries.items()]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


# ── windows over ranks ────────────────────────────────────────────────────────────────────────────────────────


class Sequences(nn.Module):
    """A mean over as many tokens as a row has, like a language model's loss."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 5)
        self.to(dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), y.flatten())  # ignores -100


def ragged(dtype: torch.dtype, samples: int = 19) -> list[tuple[Tensor, Tensor]]:
    """Rows of 40 tokens of which between 4 and 40 count; the sixth has none."""
    made = torch.Generator().manual_seed(5)
    rows = []
    for number in range(samples):
        x = torch.randn(40, 8, generator=made, dtype=torch.float64).to(dtype)
        y = torch.randint(0, 5, (40,), generator=made)
        count = 0 if number == 5 else int(torch.randint(4, 41, (), generator=made))
        y[count:] = -100
        rows.append((x, y))
    return rows


def gradient(parallel: str, dtype: torch.dtype, accumulation: int, rows_at_once: int = 3) -> list[Tensor]:
    """The gradients of the first two windows over ragged data, clipped to 0.5, and the norms before."""
    torch.manual_seed(0)
    model = Sequences(dtype)
    seen: list[Tensor] = []

    class See(Plugin):
        def on_before_optimizer_step(self, trainer: Any) -> None:
            whole = shards.whole({"g": [p.grad.detach().clone() for p in trainer.model.parameters()]}, True)
            seen.append(torch.cat([g.double().flatten() for g in whole["g"]]))

        def on_after_step(self, trainer: Any) -> None:
            seen.append(trainer.step_info["grad_norm"].double().reshape(1))

    run = Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[See()],
        parallel=parallel if runtime.world_size() > 1 else None,
        gradient_accumulation_steps=accumulation,
        grad_clip_norm=0.5,
        device="cpu",
    )
    rows = ragged(dtype)
    batches: DataLoader[Any] = DataLoader(rows, batch_size=rows_at_once)  # type: ignore[arg-type]
    for _ in run.train(batches, max_steps=2):
        run.update(run.model(run.data, run.target), weight=(run.target != -100).sum())
    return seen


def windows(parallel: str, dtypes: list[torch.dtype]) -> dict[tuple[Any, int], list[Tensor]]:
    return {(dtype, n): gradient(parallel, dtype, n) for dtype in dtypes for n in (1, 2, 4, 8)}


# ── agreeing ──────────────────────────────────────────────────────────────────────────────────────────────────


class At(Plugin):
    """Do something on one rank after a step."""

    def __init__(self, step: int, rank: int, work: Any) -> None:
        self.step, self.rank, self.work = step, rank, work

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == self.step and runtime.rank() == self.rank:
            self.work(trainer)


def stops_together() -> int:
    """Rank 1 alone asks to stop after step 3: the step at which this rank ended."""
    run = engine("ddp", [At(3, 1, lambda trainer: trainer.stop("test"))])
    for _ in run.train(loader(), max_steps=20):
        run.auto_update()
    return run.step


def leaves_together(folder: str) -> tuple[int, Any]:
    """Rank 1 alone gets a SIGTERM after step 3: step and exit code of this rank."""
    run = engine(
        "ddp",
        [
            At(3, 1, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)),
            CheckpointingHook(interval=None, path=Path(folder), exit_wait=20.0),
        ],
    )
    try:
        for _ in run.train(loader(), max_steps=20):
            run.auto_update()
    except SystemExit as leaving:
        return run.step, leaving.code
    return run.step, None


def drops_together(scaler: bool, way: str = "ddp") -> dict[str, Any]:
    """A NaN loss on rank 1 alone in the third window: what a window that was dropped has changed, by rank."""
    run = engine(way, [], max_non_finite_grad_retries=2, mixed_precision="fp16" if scaler else None)
    dropped, same = list[int](), list[bool]()
    run.attach(_Dropped(dropped))
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=6):
        before = [shards.local(p.detach()).clone() for p in run.model.parameters()]
        moments = run.optimizer.state_dict()["state"] if run.optimizer is not None else {}
        steps = {number: float(entry["step"]) for number, entry in moments.items()}
        bad = runtime.rank() == 1 and run.epoch == 0 and run.batch_idx == 2
        loss = nn.functional.cross_entropy(run.model(run.data), run.target)
        known = run.step
        run.update(loss * float("nan") if bad else loss)
        if run.step == known:
            after = run.optimizer.state_dict()["state"] if run.optimizer is not None else {}
            now = [shards.local(p.detach()) for p in run.model.parameters()]
            same.append(all(torch.equal(a, b) for a, b in zip(before, now, strict=True)))
            same.append({number: float(entry["step"]) for number, entry in after.items()} == steps)
    assert run.grad_scaler is not None or not scaler
    scale = run.grad_scaler.get_scale() if run.grad_scaler is not None else 1.0
    state = run.state_dict()["model"]
    total = math.fsum(value.double().sum().item() for value in state.values())
    return {"dropped": dropped, "same": same, "step": run.step, "scale": scale, "weights": total}


class _Dropped(Plugin):
    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def on_step_dropped(self, trainer: Any) -> None:
        self.seen.append(trainer.step)


def unequal_loaders() -> str:
    """Lists of 3 and of 4 batches."""
    run = engine("ddp", [])
    batches = [(torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))] * (3 + runtime.rank())
    try:
        for _ in run.train(batches):
            run.auto_update()
    except ValueError as error:
        return str(error)
    return ""


def unsized_loaders() -> tuple[int, int]:
    """Generators of 3 and of 4 batches: steps taken, and whether the last was known."""
    run, last = engine("ddp", []), 0
    batch = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    for _ in run.train(batch for _ in range(3 + runtime.rank())):
        run.auto_update()
        last += run.is_epoch_end
    return run.step, last


def skips_the_last_update() -> list[float]:
    """The body leaves out the epoch's last micro-batch, which would have closed the window: weights' sums."""
    run = engine("ddp", [], gradient_accumulation_steps=4)
    for _ in run.train(DataLoader(data(24), batch_size=4), num_epochs=1):
        if not run.is_epoch_end:
            run.auto_update()
    return [p.detach().double().sum().item() for p in run.model.parameters()]


def agree() -> dict[str, Any]:
    return {
        "stop": stops_together(),
        "unequal": unequal_loaders(),
        "unsized": unsized_loaders(),
        "drop": drops_together(False),
        "drop16": drops_together(True),
        "drop_fsdp": drops_together(False, "fsdp"),
        "drop16_fsdp": drops_together(True, "fsdp"),
        "skips": skips_the_last_update(),
    }


# ── the user's own way ────────────────────────────────────────────────────────────────────────────────────────


class Own(BaseTrainer):
    """Document 003's way: the model is wrapped in build_model, the sampler knows the ranks."""

    def __init__(self, wrap: str, max_steps: int = 6, **kwargs: Any) -> None:
        super().__init__(max_steps, device="cpu", grad_clip=1.0, gradient_accumulation_steps=2, **kwargs)
        self.wrap = wrap

    def build_data_loader(self) -> Any:
        if runtime.world_size() == 1:
            return DataLoader(data(48), batch_size=12)
        return DataLoader(data(48), batch_size=6, sampler=DistributedSampler(data(48), shuffle=False))

    def build_model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Net()
        if runtime.world_size() == 1:
            return model
        if self.wrap == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if self.wrap == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        return model

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def forward(self, input: Any) -> Any:
        x, y = input
        return nn.functional.cross_entropy(self.model(x), y), {}


def own_way(wrap: str) -> dict[str, Any]:
    trainer = Own(wrap)
    trainer.train()
    return trainer.state_dict()["model"]


def own_ways() -> dict[str, Any]:
    return {wrap: own_way(wrap) for wrap in ("ddp", "fsdp2")}


def hybrid() -> dict[str, Any]:
    """HSDP on a 2 × 2 mesh."""
    run = engine("fsdp", [], mesh=(2, 2))
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=6):
        run.auto_update()
    return run.state_dict()["model"]


def exchanged() -> int:
    """How many numbers DDP exchanges a step where only adapters train."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from orbit.plugin import LoRA

    counted: list[int] = []

    def counting(model: nn.Module, mesh: Any) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(model)

        def hook(state: Any, bucket: torch.distributed.GradBucket):  # type: ignore[no-untyped-def]
            counted.append(bucket.buffer().numel())
            return allreduce_hook(state, bucket)

        hook.__annotations__["bucket"] = torch.distributed.GradBucket  # not its name
        wrapped.register_comm_hook(None, hook)
        return wrapped

    run = engine(counting, [LoRA(target_names=["up"], r=2, alpha=4)])
    for _ in run.train(loader(), max_steps=1):
        run.auto_update()
    assert sum(counted) == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return sum(counted)


def averaged(way: str, folder: str | None, steps: int) -> dict[str, Any]:
    """A run with moving averages, evaluated with them at its end: the averages, and the loss."""
    from orbit.plugin import EMA

    ema = EMA(0.8)
    hooks: list[Plugin] = [ema]
    if folder is not None:
        hooks.append(CheckpointingHook(interval=4, path=Path(folder), keep_previous=None, exit_signals=[]))
    run = engine(way, hooks)
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=steps):
        run.auto_update()
    for _ in run.eval(loader()):
        run.auto_update()
    return {"ema": run.state_dict()["EMA"], "val_loss": run.metrics["val_loss"]}


def refused_shards(folder: str) -> str:
    """Rank 1 may write no file beyond 100 bytes: the error of this rank."""
    from orbit.core.checkpoint import CheckpointError

    run = engine("fsdp", [CheckpointingHook(interval=1, path=Path(folder), exit_signals=[])])
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if runtime.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for _ in run.train(loader(), max_steps=2):
            run.auto_update()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    return ""

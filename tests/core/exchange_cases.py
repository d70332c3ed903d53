"""What the tests of `test_exchange.py` run on every rank (and, with one, alone)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.ranks import shards
from orbit.engine import Engine
from orbit.plugin import EMA, Checkpoint, CheckpointingHook
from tests.core.parallel_cases import TOGETHER, Net, Own, data, engine, loader


def weights(run: Any) -> dict[str, Tensor]:
    return dict(run.state_dict()["model"])


def steps(run: Engine, count: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(7)
    for _ in run.train(loader(), max_steps=count):
        run.auto_update()
    return weights(run)


def half_wrapped() -> dict[str, dict[str, Tensor]]:
    """A function that wraps some of the model, or nothing of it."""

    def wrap(kind: str) -> Any:
        def spread(model: Any, mesh: Any) -> nn.Module:
            from torch.distributed.fsdp import fully_shard

            if kind == "blocks":
                for layer in model.layers:
                    fully_shard(layer, mesh=mesh)
            elif kind == "head":
                model.head = nn.parallel.DistributedDataParallel(model.head)
            return model

        return spread

    return {
        kind: {
            key.replace("head.module.", "head."): value
            for key, value in steps(engine(wrap(kind), [])).items()
        }
        for kind in ("blocks", "head", "nothing")
    }


class Scaled(nn.Module):
    """A criterion that learns too; `unused` takes no part in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.rand(3)), nn.Parameter(torch.ones(2))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output * self.scale, target)


def criterion(way: str) -> dict[str, Tensor]:
    """Every rank makes the criterion from other random numbers: rank 0's count."""
    torch.manual_seed(0)
    model = Net()
    torch.manual_seed(100 + runtime.rank())
    scaled = Scaled()
    run = Engine(
        model,
        torch.optim.AdamW([*model.parameters(), *scaled.parameters()], lr=1e-2),
        scaled,
        plugins=[],
        parallel=way if runtime.world_size() > 1 else None,
        grad_clip_norm=0.5,
        device="cpu",
    )
    return {**steps(run, 6), **{name: p.detach().clone() for name, p in scaled.named_parameters()}}


def without_weight(way: str) -> dict[str, Tensor]:
    """On the last rank the first window, and half of the second, is a mean over nothing: 0/0."""
    run = engine(way, [], gradient_accumulation_steps=2, grad_clip_norm=None)
    x, y = data(16).tensors
    for _ in run.train([(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)]):
        mask = torch.full((4,), float(runtime.rank() == 0 or run.batch_idx > 2))
        losses = nn.functional.cross_entropy(run.model(run.data), run.target, reduction="none")
        run.update((losses * mask).sum() / mask.sum(), weight=mask.sum())
    assert run.step == 2
    return weights(run)


def finds_after_evaluation(way: str) -> dict[str, Any]:
    run = engine(way, [])
    for _ in run.eval(loader()):
        run.auto_update()
    torch.manual_seed(7)
    found = run.lr_find(loader(), steps=6, max_lr=1e-1)
    return {"losses": found.losses, **steps(run)}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def normed(way: str, folder: str, count: int) -> dict[str, Any]:
    """A run with batch norm, evaluated at its end."""
    torch.manual_seed(0)
    hook = CheckpointingHook(interval=3, path=Path(folder), exit_signals=[])
    run = engine(way, [hook], Normed())
    batches = DataLoader(data(48), batch_size=TOGETHER // runtime.world_size(), shuffle=True)
    torch.manual_seed(7)
    for _ in run.train(batches, max_steps=count):
        run.auto_update()
    for _ in run.eval(batches):
        run.auto_update()
    buffers = {name: buffer.clone() for name, buffer in run.unwrapped_model.named_buffers()}
    return {"val_loss": run.metrics["val_loss"], **buffers}


def normed_all(folder: str) -> dict[str, list[dict[str, Any]]]:
    """Uninterrupted, begun, and resumed."""
    return {
        way: [normed(way, str(Path(folder) / f"{way} {name}"), count) for name, count in PLANS]
        for way in ("ddp", "fsdp")
    }


PLANS = (("whole", 7), ("cut", 5), ("cut", 7))


class Sharded(Own):
    """With what a run of document 003 has besides: groups, a schedule, hooks."""

    def __init__(self, folder: str | None, max_steps: int, hooks: Any = (), **options: Any) -> None:
        super().__init__("fsdp2", max_steps, **options)
        self.folder, self.more = folder, list(hooks)

    def build_optimizer(self) -> torch.optim.Optimizer:
        assert isinstance(self.model, Net)
        layers, head = list(self.model.layers.parameters()), list(self.model.head.parameters())
        return torch.optim.AdamW([{"params": head, "lr": 2e-2}, {"params": layers}], lr=1e-2)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def build_hooks(self) -> Any:
        if self.folder is None:
            return self.more
        return [*self.more, CheckpointingHook(interval=3, path=Path(self.folder), exit_signals=[])]


def own_state(folder: str) -> dict[str, bool]:
    """Resumed runs with each kind of `state_dict_options`: are they the uninterrupted one?"""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    kinds = {
        "pieces": StateDictOptions(),
        "whole": StateDictOptions(full_state_dict=True, cpu_offload=True),
    }
    same = {}
    for name, options in kinds.items():
        place = str(Path(folder) / name)
        whole, begun, resumed = (
            Sharded(where, steps, state_dict_options=options)
            for where, steps in ((None, 8), (place, 5), (place, 8))
        )
        whole.train()
        begun.train()
        resumed.train()
        same[name] = resumed.step == 8 and equal_pieces(whole.model, resumed.model)
    return same


def equal_pieces(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(shards.local(a.detach()), shards.local(b.detach())) for a, b in pairs)


def whole_best(folder: str) -> tuple[str, bool]:
    """The best state of a run that asks for whole tensors: its name, and whether it reads back as the run."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    best = Checkpoint(path=Path(folder))
    run, again = (Sharded(None, 4, hooks, state_dict_options=options) for hooks in ([best], []))
    run.train()
    assert best.best_path is not None
    again.build()
    again.load_state_dict(again.read_checkpoint(best.best_path))
    return best.best_path.name, equal_pieces(run.model, again.model)


def own_averages() -> dict[str, Tensor]:
    run = Sharded(None, 6, [EMA(0.8)])
    run.train()
    return dict(run.state_dict()["EMA"])


def tasks(way: str, folder: str, count: int) -> dict[str, Tensor]:
    """Two tasks with an optimizer each; a rank's rows are of one of them."""
    from orbit.adapter import AdapterConfig, TaskOptimizers, adapter_parameters, inject

    torch.manual_seed(0)
    model = Net()
    for task in "ab":
        inject(model, AdapterConfig(r=2, targets=("up", "down")), task)
    optimizer = TaskOptimizers(
        {task: torch.optim.AdamW(adapter_parameters(model, task).values(), lr=1e-2) for task in "ab"},
        clip=0.5,
    )
    hook = CheckpointingHook(interval=3, path=Path(folder), exit_signals=[])
    ranks = runtime.world_size()
    run = Engine(
        model,
        optimizer,
        plugins=[hook],
        parallel=way if ranks > 1 else None,
        device="cpu",
        gradient_accumulation_steps=2,
    )
    x, y = data(48).tensors
    rows = torch.utils.data.TensorDataset(x, y, torch.arange(48) % 2)
    for _ in run.train(DataLoader(rows, batch_size=4 // ranks), max_steps=count):
        x, y, which = run.batch
        names = ["ab"[number] for number in which.tolist()]
        losses = nn.functional.cross_entropy(run.model(x, task=names), y, reduction="none")
        run.step_on(optimizer.outcome(losses, names))
    return weights(run)


def without_length() -> str:
    """A sampler that nobody can deal out."""

    class Endless(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Any:
            return iter(range(50))

    try:
        for _ in engine("ddp", []).train(DataLoader(data(), sampler=Endless())):
            pass
    except ValueError as error:
        return str(error)
    return ""


def unequal_evaluation() -> list[str]:
    """Generators of 2 and of 4 batches: what each rank is told."""
    run, told = engine("ddp", []), list[str]()
    run.logger.addFilter(lambda record: bool(told.append(record.getMessage())))
    batch = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    for _ in run.eval(batch for _ in range(2 + 2 * runtime.rank())):
        run.auto_update()
    return told


def rows_seen(folder: str) -> list[int]:
    """Rows that this rank was handed in 7 steps, in one run and in two; ranks have unequal numbers of rows."""

    def rows(name: str, count: int) -> int:
        hook = CheckpointingHook(interval=3, path=Path(folder) / name, exit_signals=[])
        run = engine("ddp", [hook])
        for _ in run.train(DataLoader(data(49), batch_size=12), max_steps=count):
            run.auto_update()
        return run.state.samples

    return [rows("whole", 7), rows("cut", 5), rows("cut", 7)]


def lost_piece(folder: str) -> tuple[str, str]:
    """The last rank's piece of a weight was NaN when it was saved."""

    def hook() -> CheckpointingHook:
        return CheckpointingHook(path=Path(folder), exit_signals=[])

    class Poison(Plugin):
        def on_after_step(self, trainer: Any) -> None:
            if runtime.rank() == runtime.world_size() - 1:
                with torch.no_grad():
                    shards.local(next(trainer.model.parameters())).fill_(torch.nan)

    for _ in (run := engine("fsdp", [Poison(), hook()])).train(loader(), max_steps=1):
        run.auto_update()
    try:
        engine("fsdp", [hook()]).build()
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "", ""


def all_of(folder: str) -> dict[str, Any]:
    ways = ("ddp", "fsdp")
    return {
        **{f"half {kind}": state for kind, state in half_wrapped().items()},
        **{f"criterion {way}": criterion(way) for way in ways},
        **{f"without weight {way}": without_weight(way) for way in ways},
        **{f"finds {way}": finds_after_evaluation(way) for way in ways},
        "averages": own_averages(),
        **{f"tasks {n}": tasks("fsdp", str(Path(folder) / "tasks"), n) for n in (5, 8)},
        "own state": own_state(folder),
        "whole best": whole_best(str(Path(folder) / "best")),
        "without length": without_length(),
        "unequal": unequal_evaluation(),
        "rows": rows_seen(str(Path(folder) / "rows")),
        "lost": lost_piece(str(Path(folder) / "lost")),
    }

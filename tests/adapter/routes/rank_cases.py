"""Two ranks train tasks on their halves of a batch; what they end with is compared with one process on all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from orbit.adapter import AdapterConfig, adapter_parameters, inject, set_trainable

TASKS = ("a", "b", "c")


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.checkpointed = checkpointed

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if self.checkpointed:
            return x + checkpoint(self.mlp, x, use_reentrant=False)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(checkpointed) for _ in range(2)])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return x


def make(dora: bool, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(7)
    model = Net(checkpointed)
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = AdapterConfig(r=2, dora=dora, targets=("embed", "blocks.*.up", "blocks.*.down", "attention"))
        inject(model, config, task)
        with torch.no_grad():
            for parameter in adapter_parameters(model, task).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    for task in TASKS:
        set_trainable(model, task)
    return model


def shard(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


STEPS: dict[str, list[tuple[Any, Any]]] = {
    # what rank 0 and rank 1 use, step by step; c is used by none
    "one task": [("a", "a")] * 3,
    "a task for each rank": [("a", "b"), ("b", "a"), ("a", "a")],
    "rows": [(["a", "a"], ["b", "b"]), (["a", None], ["a", "b"]), ([None, None], ["b", "a"])],
    "none and one": [(None, "a"), ("b", None), ("a", "b")],
}
CASES: dict[str, tuple[Callable[[nn.Module], nn.Module], bool, bool]] = {
    "fully_shard": (shard, False, False),
    "fully_shard, DoRA": (shard, True, False),
    "fully_shard, checkpointed": (shard, False, True),
    "DistributedDataParallel": (data_parallel, False, False),
}


def rows(way: Any) -> list[str | None]:
    return way if isinstance(way, list) else [way, way]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def error(case: str, steps: list[tuple[Any, Any]]) -> float:
    wrap, dora, checkpointed = CASES[case]
    rank = dist.get_rank()
    alone, fresh, together = make(dora), make(dora), make(dora, checkpointed)
    wrapped = wrap(together)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (alone, together)]
    for seed, ways in enumerate(steps):
        batch = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(seed))
        alone(batch, task=[*rows(ways[0]), *rows(ways[1])]).square().mean().backward()
        wrapped(batch[2 * rank : 2 * rank + 2], task=ways[rank]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    worst, true, start = 0.0, adapter_parameters(alone), adapter_parameters(fresh)
    for name, parameter in adapter_parameters(together).items():
        got = full(parameter.detach())
        worst = max(worst, ((got - true[name]).norm() / true[name].norm()).item())
        if ".c." in name:
            assert torch.equal(got, start[name]), name
    return worst


def errors() -> dict[str, float]:
    """Case → the worst ‖Δp‖/‖p‖ over the tasks' parameters after three AdamW steps."""
    return {
        f"{case}: {name}": error(case, steps)
        for case in CASES
        for name, steps in STEPS.items()
        if "Parallel" not in case or "task" in name  # DDP cannot run a rank without any task
    }

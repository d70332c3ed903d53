"""Two ranks train a mixture on their halves of a batch; they end with what one process on all of it ends with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM  # noqa: F401 (here it is imported once for all ranks)

from orbit.engine import Engine
from tests.xlora.oracle import VOCABULARY, mixture


def data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def checkpointed(model: Any) -> nn.Module:
    model.activation_checkpointing_enable({"use_reentrant": False})
    return DistributedDataParallel(model)


def shard(model: Any) -> nn.Module:
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


CASES: dict[str, tuple[Callable[[Any], nn.Module], dict[str, Any]]] = {
    "router": (data_parallel, {}),
    "router, top 1": (data_parallel, {"top_k_lora": 1, "layerwise_scalings": True, "xlora_depth": 2}),
    "router and experts": (data_parallel, {"use_trainable_adapters": True}),
    "router and experts, top 1": (data_parallel, {"use_trainable_adapters": True, "top_k_lora": 1}),
    "experts in the scaling pass": (
        data_parallel,
        {"use_trainable_adapters": True, "scaling_pass_value": 0.3},
    ),
    "checkpointed": (checkpointed, {"use_trainable_adapters": True, "top_k_lora": 2}),
    "fully_shard": (shard, {"use_trainable_adapters": True, "top_k_lora": 2}),
}


def batch(seed: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(seed))


def trains(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model: nn.Module, sgd: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    sgd.step()
    sgd.zero_grad()


def error(case: str) -> float:
    wrap, settings = CASES[case]
    rank = dist.get_rank()
    alone, together = mixture(**settings).train(), mixture(**settings).train()
    start = {name: p.detach().clone() for name, p in trains(alone).items()}
    wrapped = wrap(together)
    one, both = (torch.optim.SGD(trains(m).values(), lr=0.3) for m in (alone, together))
    for seed in range(3):
        ids = batch(seed)
        step(alone, one, ids)
        step(wrapped, both, ids[2 * rank : 2 * rank + 2])
    return worst(alone, together, start)


def by_engine() -> float:
    """The same by Engine, around which nothing changes."""
    alone, together = mixture(top_k_lora=2).train(), mixture(top_k_lora=2).train()
    start = {name: p.detach().clone() for name, p in trains(alone).items()}
    one = torch.optim.SGD(trains(alone).values(), lr=0.3)
    both = torch.optim.SGD(trains(together).values(), lr=0.3)
    engine = Engine(data_parallel(together), both, plugins=[], device="cpu")
    mine = [batch(seed)[2 * dist.get_rank() :][:2] for seed in range(3)]
    for _ in engine.train([{"input_ids": ids, "labels": ids} for ids in mine], num_epochs=1):
        engine.auto_update()
    for seed in range(3):
        step(alone, one, batch(seed))
    assert engine.global_step == 3
    return worst(alone, together, start)


def worst(alone: nn.Module, together: nn.Module, start: dict[str, torch.Tensor]) -> float:
    found, true = 0.0, trains(alone)
    for name, parameter in trains(together).items():
        got = parameter.detach()
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        assert not torch.equal(true[name], start[name]) or "lora" in name, name
        found = max(found, ((got - true[name]).norm() / true[name].norm()).item())
    return found


def errors() -> dict[str, float]:
    """Case → the worst ‖Δp‖/‖p‖ over the parameters that train after three steps.

    DDP looks for no unused parameters, so that a parameter without a gradient would stop it.
    """
    return {case: error(case) for case in CASES} | {"Engine": by_engine()}

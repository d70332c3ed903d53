"""One model on several processes, started by torchrun:

    torchrun --nproc-per-node 2 train.py            Engine(model, ..., parallel="ddp")

    "ddp"     every rank holds the model; gradients are averaged over ranks (DistributedDataParallel)
    "fsdp"    every rank holds a piece of each parameter (FSDP2, `fully_shard` per block); on a mesh of two dimensions
              pieces are held by each row of it (HSDP: replicate × shard)
    callable  `parallel(model, mesh) -> model`: your own way; the mesh spans all ranks. Where a step may leave some
              parameters unused, as rows of several tasks do, DDP must be told:
              `lambda model, mesh: DistributedDataParallel(model, find_unused_parameters=True)`

It comes after adapters and freezing and before the first step; the optimizer that was made from the model's parameters
is given the new ones. Gradients are averaged by torch, and here those that it leaves alone (of a criterion, of what
your function does not wrap), so a window's gradient Σ wᵢ·∇lossᵢ / Σ wᵢ needs
one factor, ranks / Σ wᵢ over all ranks (`core/update.py`).
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from orbit.core import runtime
from orbit.core.blocks import BlocksError, find_blocks
from orbit.core.ranks import shards

Parallel: TypeAlias = "str | Callable[[nn.Module, Any], nn.Module]"
TIMEOUT = timedelta(minutes=10)  # for a rank that does not answer: a hang is an error


def check(parallel: Any, mesh: Any) -> None:
    """ValueError unless it names a way, or is a function or None; or for a mesh that nobody would use."""
    if not (parallel is None or parallel in ("ddp", "fsdp") or callable(parallel)):
        raise ValueError(
            f'parallel={parallel!r} is unknown: give "ddp", "fsdp", a function (model, mesh) -> model, or None'
        )
    if mesh is not None and parallel in (None, "ddp"):
        raise ValueError(
            f'mesh={mesh!r} means nothing to parallel={parallel!r}: give it with "fsdp" or a function'
        )


def start() -> None:
    """Join the process group that torchrun describes, unless that was done; every operation has a timeout.

    Call `torch.distributed.init_process_group` yourself, before, for another timeout or backend.

    Raises:
        RuntimeError: this process was not started by torchrun.
    """
    if dist.is_initialized():
        return
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise RuntimeError(
            f"parallel= needs several processes, and {', '.join(missing)} are not set: start the script with "
            "`torchrun --nproc-per-node N script.py`, or call torch.distributed.init_process_group first"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def make_mesh(mesh: Any, device: torch.device) -> Any:
    """The mesh of all ranks: a given one, one of the given sizes, or one dimension.

    Raises:
        ValueError: its size is not the number of ranks, or it has more than two dimensions.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    ranks = runtime.world_size()
    sizes = (ranks,) if mesh is None else tuple(mesh.shape if isinstance(mesh, DeviceMesh) else mesh)
    count = 1
    for size in sizes:
        count *= size
    if count != ranks or len(sizes) not in (1, 2):
        raise ValueError(
            f"mesh={sizes} has {count} places and this run {ranks} ranks: give one number, or two (replicate, shard) "
            "whose product is the number of ranks"
        )
    if isinstance(mesh, DeviceMesh):
        return mesh
    return init_device_mesh(
        device.type, sizes, mesh_dim_names=("shard",) if len(sizes) == 1 else ("replicate", "shard")
    )


def spread(model: nn.Module, parallel: Parallel, mesh: Any, device: torch.device) -> nn.Module:
    """The model as `parallel` says, with rank 0's weights everywhere.

    Raises:
        ValueError: a function that returns no module; a model that is wrapped already.
    """
    if is_spread(model):
        raise ValueError(
            f"the model is a {type(model).__name__} that is spread over ranks already: give parallel=None, or the "
            "plain model"
        )
    if callable(parallel):
        spread_model = parallel(model, mesh)
        if not isinstance(spread_model, nn.Module):
            raise ValueError(
                f"parallel(model, mesh) returned {type(spread_model).__name__}: return the model to train"
            )
        return spread_model
    if parallel == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    try:
        return find_blocks(model)
    except BlocksError:  # a small model of odd layers is one group
        return []


def follow(optimizer: Optimizer, before: Sequence[tuple[str, nn.Parameter]], model: nn.Module) -> None:
    """Let the optimizer hold the parameters that have taken the places of those `before`, by name.

    Raises:
        ValueError: it has a state already: its moments are of the whole parameters.
    """
    names = {id(p): name for name, p in before}
    now = dict(model.named_parameters())
    if all(now.get(name) is p for name, p in before):
        return
    if optimizer.state:
        raise ValueError(
            "the optimizer has stepped before its parameters were cut up: make a new one for this run, or load its "
            "state by a checkpoint"
        )
    for group in optimizer.param_groups:
        group["params"] = [
            now[names[id(p)]] if id(p) in names and names[id(p)] in now else p for p in group["params"]
        ]


def is_spread(model: nn.Module) -> bool:
    """The model's gradients are averaged over ranks by torch.

    Raises:
        ValueError: it is wrapped by FSDP1.
    """
    _refuse_fsdp1(model)
    parallel, fsdp = sys.modules.get("torch.nn.parallel"), sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(
        kind
        for kind in (
            getattr(parallel, "DistributedDataParallel", None),
            getattr(fsdp, "FSDPModule", None),
        )
        if kind is not None
    )
    return any(isinstance(module, kinds) for module in model.modules())


def exchanged(model: nn.Module) -> set[int]:
    """The parameters, by `id`, whose gradients torch averages over ranks: those in pieces, and those inside of DDP."""
    parallel = sys.modules.get("torch.nn.parallel")
    kind = getattr(parallel, "DistributedDataParallel", ())
    found = {id(p) for p in model.parameters() if shards.is_sharded(p)}
    for module in model.modules():
        if isinstance(module, kind):
            found |= {id(p) for p in module.parameters()}
    return found


def shared_buffers(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the buffers are that a checkpoint holds and DDP does not send round: running means under FSDP2."""
    parallel = sys.modules.get("torch.nn.parallel")
    kind = getattr(parallel, "DistributedDataParallel", ())
    inside = {id(part) for module in model.modules() if isinstance(module, kind) for part in module.modules()}
    return [
        (module._buffers, name)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if id(module) not in inside and buffer is not None and name not in module._non_persistent_buffers_set
    ]


def share(places: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Give all ranks rank 0's buffers, as DDP does before a forward. All ranks call it."""
    buffers = [holder[name] for holder, name in places]
    kept = [b for b in buffers if b is not None and not shards.is_sharded(b)]
    for exchange in [dist.broadcast(buffer.detach(), src=0, async_op=True) for buffer in kept]:
        exchange.wait()


def _refuse_fsdp1(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", None)
    for name, module in model.named_modules():
        if kind is not None and isinstance(module, kind):
            raise ValueError(
                f"{name or 'the model'} is wrapped by FullyShardedDataParallel (FSDP1), which hides its parameters' "
                "names: use FSDP2 instead, `for block in blocks: fully_shard(block)` and `fully_shard(model)` from "
                'torch.distributed.fsdp, or Engine(parallel="fsdp")'
            )

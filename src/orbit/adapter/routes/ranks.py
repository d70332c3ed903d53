"""Tasks under FSDP2, where every rank has rows of its own and perhaps of other tasks.

`fully_shard` reduces the gradients of a group of parameters as one flat tensor, made of those that have one. A rank
whose rows use task a and one whose rows use b would add a's gradient to b's, or wait for bytes that never come. So
a call that may be trained asks all ranks which tasks they use, and what only others use takes part with a
gradient of zero: y + 0·Σp. Tasks that no rank uses get no gradient at all, as on one rank.

DistributedDataParallel finds such parameters by itself, where it is told to (find_unused_parameters=True), if every
rank uses some task.

The question is one small all-reduce for each call of a sharded model; all ranks call it together, as they must anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from orbit.adapter.owners import AnySlot, ModuleSlot, Whole


def may_differ() -> bool:
    """May this call be trained, with other ranks?"""
    return torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()


def elsewhere(model: nn.Module, mine: Sequence[str], tasks: Sequence[str]) -> tuple[str, ...]:
    """Those of the tasks that other ranks of a sharded model use in this call, and this one (`mine`) does not."""
    mesh = _mesh(model)
    if mesh is None:
        return ()
    used = torch.tensor([task in mine for task in tasks], dtype=torch.int32, device=mesh.device_type)
    for axis in range(mesh.ndim):
        dist.all_reduce(used, dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return tuple(
        task for task, somewhere in zip(tasks, used.tolist(), strict=True) if somewhere and task not in mine
    )


def _mesh(model: nn.Module) -> Any | None:
    """The mesh over which `fully_shard` has spread a model, or None."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second
    if fsdp is None:
        return None
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                return group.mesh_info.mesh
    return None


def touched(output: Any, slots: Sequence[AnySlot]) -> Any:
    """A layer's output + 0·Σp over the trainable parameters of the slots."""
    zero = torch.stack(
        [p.sum() for slot in slots for p in _parameters(slot) if p.requires_grad] or [torch.zeros(())]
    )
    leaves, form = tree_flatten(output)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[index] = leaf + (0 * zero.sum()).to(leaf)
            break
    return tree_unflatten(leaves, form)


def _parameters(slot: AnySlot) -> Iterator[nn.Parameter]:
    if isinstance(slot, Whole):
        for one in slot.slots.values():
            yield from _parameters(one)
    elif isinstance(slot, ModuleSlot):
        yield from slot.module.parameters()
    else:
        yield from (owner.weight for owner in slot if owner is not None)

"""Tensors that lie in pieces on several ranks: made whole for a checkpoint, and cut up again on loading.

FSDP2 keeps each parameter, and each of its optimizer's moments, as a DTensor. A checkpoint in one file holds whole
tensors under the names that an unsharded run gives them, so that it loads on any number of ranks, sharded or not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from orbit.core import runtime


def is_sharded(value: Any) -> bool:
    """A DTensor; nothing is one in a process that never imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def holds_shards(model: nn.Module) -> bool:
    """Some parameter of the model lies in pieces."""
    return any(is_sharded(p) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Let go of whole parameters that a forward gathered and kept for a backward: `parameters()` are pieces then."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def whole(state: Any, everywhere: bool) -> Any:
    """A nested state with every DTensor as the whole tensor on the CPU. All ranks must call it.

    With `everywhere` False only rank 0 gets them, one after the other; the others get empty tensors in their place.
    """
    if is_sharded(state):
        full = state.detach().full_tensor()
        return full.cpu() if everywhere or runtime.is_main_process() else torch.empty(0, dtype=full.dtype)
    if isinstance(state, dict):
        return type(state)((key, whole(value, everywhere)) for key, value in state.items())
    if isinstance(state, list | tuple):
        return type(state)(whole(value, everywhere) for value in state)
    return state


def cut_like(own: Tensor, given: Tensor) -> Tensor:
    """`given`, a whole tensor that every rank has, cut up as `own` is."""
    if not is_sharded(own) or is_sharded(given) or own.shape != given.shape:
        return given
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = own
    return distribute_tensor(
        given.to(sharded.to_local().device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def cut_model_state(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A model's whole state in the pieces that its own `state_dict()` has."""
    return {
        key: cut_like(own[key], value) if isinstance(own.get(key), Tensor) else value
        for key, value in given.items()
    }


def cut_optimizer_state(optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole `state_dict()` with the moments of sharded parameters in pieces like theirs."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    owner = dict(zip(numbers, held, strict=False))
    state = {
        number: {
            name: cut_like(owner[number], value) if number in owner and isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in given["state"].items()
    }
    return {**given, "state": state}


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing its memory; the tensor itself if it is not sharded."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor

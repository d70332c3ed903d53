"""What the tests of layers and files run on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from orbit.core import runtime
from orbit.model import load_layer, save_layer


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(3, 5)
    )
    model[4].weight = model[2].weight
    return model


def sharded(seed: int) -> nn.Module:
    return fully_shard(net(seed), mesh=init_device_mesh("cpu", (runtime.world_size(),)))


def save_and_load(folder: str) -> bool:
    """Is a loaded model, in pieces and in one, the one that was saved?"""
    source, other, plain = sharded(1), sharded(2), net(3)
    path = Path(folder) / "layer.safetensors"
    save_layer(source, "", path)
    torch.distributed.barrier()
    load_layer(other, "", path)
    load_layer(plain, "", path)
    pieces = zip(source.parameters(), other.parameters(), strict=True)
    same = all(torch.equal(a.to_local(), b.to_local()) for a, b in pieces)  # type: ignore[attr-defined]
    whole = zip(net(1).parameters(), plain.parameters(), strict=True)
    return same and all(torch.equal(a, b) for a, b in whole)

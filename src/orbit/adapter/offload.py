"""Weights that accelerate keeps elsewhere between forwards.

An offloaded layer's weight is on the meta device and comes back for the length of its forward. Its adapters
live on the device where the forward runs: a matrix on the meta device would multiply to garbage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from orbit.adapter.errors import GraftError


def offload_hook(layer: nn.Module) -> Any | None:
    """The accelerate hook that offloads this layer's own weight, or None."""
    hook = layer.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            return one
    return None


def execution_device(layer: nn.Module) -> torch.device:
    """The device on which the layer's forward runs.

    Raises:
        GraftError: the weight is on the meta device and nothing brings it back.
    """
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    if not weight.is_meta:
        return weight.device
    hook = offload_hook(layer)
    if hook is None:
        raise GraftError("its weight is on the meta device; load the weights before adapting the model")
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


@contextmanager
def weights_at_hand(layer: nn.Module) -> Iterator[None]:
    """Inside, the weight of an offloaded layer is on its execution device."""
    weight = getattr(layer, "weight", None)  # which the site of a module's parameter has not (`whole.py`)
    hook = offload_hook(layer) if isinstance(weight, torch.Tensor) and weight.is_meta else None
    if hook is None:
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)

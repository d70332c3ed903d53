"""The dense oracle: the same model with W' = W + ΔW written out, and how to compare a graft with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import AdapterConfig, inject, task_layers

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "gated": {"gated": True},
    "dora": {"dora": True},
    "gated dora": {"dora": True, "gated": True},
}
Shapes = Callable[[Tensor, Tensor], Tensor]


def trained(layer: nn.Module, task: str = "default", seed: int = 0, **config: Any) -> nn.Module:
    """`layer` with a task in which every tensor has something."""
    inject(layer, AdapterConfig(**{"r": 2, "alpha": 3, **config}), task)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in task_layers(layer, task)[""].owners(task).values():
            owner.weight.add_(0.3 * torch.randn(owner.weight.shape, generator=noise).to(owner.weight))
    return layer


def dense_weight(W: Tensor, slot: Any, delta: Tensor, out_axis: int) -> Tensor:
    """W' of the definition, from ΔW/(g·s) in the weight's shape; rows along `out_axis` are DoRA's."""
    V = W + slot.coefficient * delta
    if slot.magnitude is None:
        return V
    others = [axis for axis in range(V.dim()) if axis != out_axis % V.dim()]
    norm = V.detach().square().sum(others, keepdim=True).sqrt()
    return (
        slot.magnitude.weight.view([-1 if axis == out_axis % V.dim() else 1 for axis in range(V.dim())])
        * V
        / norm
    )


def same_as_dense(
    layer: nn.Module, bare: nn.Module, x: Tensor, delta: Shapes, out_axis: int = 0, *, rtol: float = 1e-8
) -> None:
    """Outputs, and gradients of every tensor of the task and of the input, are those of the bare layer with W'.

    Args:
        layer: adapted by one task, in float64.
        bare: the layer as it was.
        delta: B·A in the weight's shape, from the tensors of A and B as the layer keeps them.
    """
    slot = layer.slots()["default"]
    leaves = [owner.weight for owner in slot if owner is not None]
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        leaves.append(x)
    weights = {
        "weight": dense_weight(bare.weight.detach(), slot, delta(slot.down.weight, slot.up.weight), out_axis)
    }
    y, oracle = layer(x), functional_call(bare, weights, (x,))
    torch.testing.assert_close(y, oracle, rtol=rtol, atol=1e-10)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    mine, theirs = (torch.autograd.grad((out * dy).sum(), leaves) for out in (y, oracle))
    for gradient in theirs:
        assert gradient.abs().max() > 0
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-10)


def bare_copy(layer: nn.Module) -> nn.Module:
    """A frozen copy of a layer, to compare with."""
    return copy.deepcopy(layer).requires_grad_(False)

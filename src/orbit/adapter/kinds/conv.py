"""Adapted convolutions: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d` and their subclasses.

    y = W' ⋆ x + b,    W' = W + ΔW,    ΔW = s·B·A  in the matrix view, (out, in/g·∏k)
    y = base + s·B ⋆₁ (A ⋆ x)        A ⋆ is the layer's own convolution, the same A in every group; B ⋆₁ is
                                     one of kernel 1 from the r channels of a group to its out/g
    y = base + ΔW ⋆ x                where g·r > out, so that ΔW ⋆ is the shorter product (depthwise layers)

x (N, in, …)   y (N, out, …), both also without N   W (out, in/g, *k)   A (r, in/g, *k)   B (out, r, 1, …)   m (out,)

A has the layer's stride, padding, dilation and padding mode, so that ΔW is exactly an update of W. (PEFT's A
ignores the last two. With groups it sees all channels, which no update of W does.)

The base is a product of its own in either form: W + ΔW would round ΔW away in half precision.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter.errors import RouteError
from orbit.adapter.kinds.dense import DenseGraft
from orbit.adapter.kinds.registry import register_kind
from orbit.adapter.lora import compute_dtype
from orbit.adapter.owners import Slot
from orbit.adapter.routes.plan import Mix

_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvGraft(DenseGraft):
    """What the three mixins share; torch's classes share a base too, but not their forward."""

    FORWARDS: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    _conv_forward: Any

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        dtype = compute_dtype(x, slot.down.weight)
        x, A, B = x.to(dtype), slot.down.weight.to(dtype), slot.up.weight.to(dtype)
        sB = slot.coefficient.to(dtype) * B
        if self.groups * slot.up.r > self.out_channels:
            update = self._conv_forward(x, self.as_weight(sB.flatten(1) @ A.flatten(1)), None)
        else:
            As = A if self.groups == 1 else A.repeat(self.groups, *[1] * (A.dim() - 1))
            h = self._conv_forward(x, As, None)
            update = _POINTWISE[len(self.kernel_size)](h, sB, groups=self.groups)
        return (base + update).to(base.dtype)

    def mixed(self, mix: Mix, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Several tasks, for batches alone: an image has no positions of a sequence.

        Raises:
            RouteError: rows or scalings for an input without a batch axis; scalings of more than one position.
        """
        batched = input.dim() == len(self.kernel_size) + 2
        if mix.weights.dim() > 1 and not batched:
            raise RouteError(
                f"a {type(self).__name__} was given {tuple(input.shape)}, an input without a batch axis, and the "
                "route says what each row of a batch uses; give it a batch, or use one task"
            )
        if mix.weights.dim() == 3 and mix.weights.shape[1] != 1:
            raise RouteError(
                f"scalings for {mix.weights.shape[1]} positions of a sequence do not fit a convolution, which has "
                "none; leave its layers out of the route, or scale whole rows: (batch, 1, layers, tasks)"
            )
        if mix.weights.dim() == 3:
            mix = mix._replace(weights=mix.weights[:, 0])
        return super().mixed(mix, input, *args, **kwargs)

    def file_view(self, bank: str, tensor: Tensor) -> Tensor:
        return self.along_out(tensor)[None] if bank == "lora_magnitude" else tensor

    def only_ours(self, task: str) -> bool:
        return self.groups > 1 or super().only_ours(task)

    def not_for_peft(self, task: str) -> str | None:
        if self.groups > 1:
            return f"it has groups={self.groups}, and PEFT's A sees all channels, which no update of its weight does"
        return super().not_for_peft(task)

    def along_out(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * len(self.kernel_size))

    @staticmethod
    def as_matrix(W: Tensor) -> Tensor:
        return W.reshape(W.shape[0], -1)

    def as_weight(self, M: Tensor) -> Tensor:
        return M.view(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def matrix_shape(self) -> tuple[int, int]:
        return self.out_channels, self.in_channels // self.groups * math.prod(self.kernel_size)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = [1] * len(self.kernel_size)
        return (r, self.in_channels // self.groups, *self.kernel_size), (self.out_channels, r, *ones)


class Conv1dGraft(ConvGraft, nn.Conv1d):
    """The mixin for `nn.Conv1d`."""


class Conv2dGraft(ConvGraft, nn.Conv2d):
    """The mixin for `nn.Conv2d`."""


class Conv3dGraft(ConvGraft, nn.Conv3d):
    """The mixin for `nn.Conv3d`."""


for _base, _mixin in ((nn.Conv1d, Conv1dGraft), (nn.Conv2d, Conv2dGraft), (nn.Conv3d, Conv3dGraft)):
    register_kind(_base, _mixin)

"""The basic block of residual networks (version 1).

    y = act(norm₂(W₂ ∗ dropout(act(norm₁(W₁ ∗ x)))) + shortcut(x))

    shortcut(x) = x, or norm(P · x) at the same stride where the shape changes (option B of [1])

    x    (B, C, *)    B batch, C in_channels, * positions: T, or H W, or D H W
    y    (B, O, *')   O out_channels, *' = ⌊(* − 1) / stride⌋ + 1
    W₁   (O, C/groups, *kernel_size) at `stride`
    W₂   (O, O/groups, *kernel_size) at stride 1
    P    (O, C)

[1] He et al. 2015, https://arxiv.org/abs/1512.03385, eq. 1 and 2; dropout between as in https://arxiv.org/abs/1605.07146
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from orbit.model.conv.block import ConvBlock
from orbit.model.conv.parts import (
    Activation,
    Norm,
    Size,
    check_dim,
    check_odd,
    each,
    make_activation,
)


class ResBasicBlock(nn.Module):
    """Two convolutions around which the input is carried.

    Args:
        kernel_size: odd; one number, or one a dimension.
        stride: of the first convolution and the shortcut.
        dilation, groups: of both convolutions.
        dropout: between the convolutions.
        others: as for `ConvBlock`.

    Raises:
        SettingError: a setting outside its range, or a name that is not known.
        ShapeError (in forward): the input is not (B, in_channels, *).

    >>> import torch
    >>> ResBasicBlock(16, 32, stride=2)(torch.randn(1, 16, 9, 9)).shape
    torch.Size([1, 32, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        dim: int = 2,
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_dim(dim)
        kernel, strides = each("kernel_size", kernel_size, dim), each("stride", stride, dim)
        check_odd(kernel, "ResBasicBlock")
        common: dict[str, Any] = {"dim": dim, "norm": norm, "device": device, "dtype": dtype}
        wide: dict[str, Any] = {"dilation": dilation, "groups": groups, **common}
        self.conv1 = ConvBlock(
            in_channels, out_channels, kernel, strides, activation=activation, dropout=dropout, **wide
        )
        self.conv2 = ConvBlock(out_channels, out_channels, kernel, activation=None, **wide)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or max(strides) > 1:
            self.shortcut = ConvBlock(in_channels, out_channels, 1, strides, activation=None, **common)
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x)) + self.shortcut(x))

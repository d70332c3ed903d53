"""A convolution in two cheap halves: over positions channel by channel, then over channels position by position.

    u = P ∗ x                       depthwise: P (C, 1, *kernel_size), one kernel a channel
    y = act(norm(Q · f(u) + b))     pointwise: Q (O, C)

    f   act ∘ norm in MobileNet [1]; nothing in Xception [2], where it did harm
    x   (B, C, *)    B batch, C in_channels, * positions: T, or H W, or D H W
    y   (B, O, *')   O out_channels

With k = ∏ kernel_size it costs C·(k + O) multiplications a position instead of C·k·O.

[1] Howard et al. 2017, https://arxiv.org/abs/1704.04861   [2] Chollet 2017, https://arxiv.org/abs/1610.02357
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from orbit.model.conv.block import ConvBlock
from orbit.model.conv.parts import Activation, Norm, Size


class DepthwiseSeparableConv(nn.Module):
    """A depthwise and a pointwise `ConvBlock`.

    Args:
        between: norm and activation also between the halves (MobileNet), or only after the second (Xception).
        dropout: of the output.
        others: as for `ConvBlock`.

    Raises:
        SettingError: a setting outside its range, or a name that is not known.
        ShapeError (in forward): the input is not (B, in_channels, *).

    >>> import torch
    >>> block = DepthwiseSeparableConv(32, 64, stride=2)
    >>> block(torch.randn(1, 32, 8, 8)).shape
    torch.Size([1, 64, 4, 4])
    >>> block.depthwise.conv.weight.numel() + block.pointwise.conv.weight.numel(), 32 * 64 * 9
    (2336, 18432)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        bias: bool | None = None,
        dim: int = 2,
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: float = 0.0,
        between: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.depthwise = ConvBlock(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=bias if between else bool(bias),  # the pointwise half's stands for both
            dim=dim,
            norm=norm if between else None,
            activation=activation if between else None,
            device=device,
            dtype=dtype,
        )
        self.pointwise = ConvBlock(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=bias,
            dim=dim,
            norm=norm,
            activation=activation,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))

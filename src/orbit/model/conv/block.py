"""A convolution with its norm and activation.

    y = dropout(act(norm(W ∗ x + b)))        pre_norm=False: the usual order [1]
    y = dropout(W ∗ act(norm(x)) + b)        pre_norm=True: as in pre-activated residual nets [2]

    x   (B, C, *)    B batch, C in_channels, * positions: T, or H W, or D H W
    y   (B, O, *')   O out_channels; *' = ⌊(* + 2·padding − dilation·(kernel_size − 1) − 1) / stride⌋ + 1
    W   (O, C/groups, *kernel_size)
    b   (O); left out where a norm follows, which would take it away again

[1] Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167   [2] He et al. 2016, https://arxiv.org/abs/1603.05027
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from orbit.model.conv.parts import (
    CONVS,
    Activation,
    Norm,
    Size,
    check_channels,
    check_dim,
    check_input,
    each,
    half,
    make_activation,
    make_dropout,
    make_norm,
)


class ConvBlock(nn.Module):
    """Convolution, norm, activation, dropout.

    Args:
        in_channels, out_channels: multiples of `groups`.
        kernel_size, stride, dilation: one number, or one a dimension.
        padding: zeros on both sides, one number or one a dimension; "same" and "valid" as torch has them. None keeps
            the size at stride 1 where the kernel is odd.
        bias: None means only where no norm follows the convolution.
        dim: 1, 2 or 3.
        norm: "batch", "group", "instance", "layer" (over channels at each position), None, or a function
            `norm(channels) -> module`.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", None, or a function
            of a tensor; a module is copied.
        dropout: probability that a number of the output is zeroed in training.
        pre_norm: norm and activation before the convolution.

    Raises:
        SettingError: a setting outside its range, or a name that is not known.
        ShapeError (in forward): the input is not (B, in_channels, *).

    >>> import torch
    >>> block = ConvBlock(3, 16, stride=2)
    >>> block(torch.randn(4, 3, 32, 32)).shape
    torch.Size([4, 16, 16, 16])
    >>> list(dict(block.named_parameters()))
    ['conv.weight', 'norm.weight', 'norm.bias']
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool | None = None,
        dim: int = 2,
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: float = 0.0,
        pre_norm: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        check_dim(dim)
        check_channels(groups, in_channels=in_channels, out_channels=out_channels)
        kernel, spread = each("kernel_size", kernel_size, dim), each("dilation", dilation, dim)
        if padding is None:
            padding = half(kernel, spread)
        elif not isinstance(padding, str):
            padding = each("padding", padding, dim, least=0)
        self.dim, self.pre_norm = dim, pre_norm
        self.conv = CONVS[dim](
            in_channels,
            out_channels,
            kernel,
            each("stride", stride, dim),
            padding,
            spread,
            groups,
            bias=(norm is None or pre_norm) if bias is None else bias,
            device=device,
            dtype=dtype,
        )
        self.norm = make_norm(
            norm, in_channels if pre_norm else out_channels, dim, device=device, dtype=dtype
        )
        self.act = make_activation(activation)
        self.dropout = make_dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        check_input(x, self.conv.in_channels, self.dim, "ConvBlock")
        if self.pre_norm:
            return self.dropout(self.conv(self.act(self.norm(x))))
        return self.dropout(self.act(self.norm(self.conv(x))))

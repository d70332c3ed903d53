"""Temporal convolutional network: residual blocks of causal convolutions whose dilation doubles.

    h₀ = x
    hᵢ = act(Fᵢ(hᵢ₋₁) + shortcut(hᵢ₋₁)),  i = 1 … L
    Fᵢ = dropout ∘ act ∘ norm ∘ conv ∘ dropout ∘ act ∘ norm ∘ conv,  both of dilation 2^(i−1)

    shortcut(h) = h, or P · h + p where the number of channels changes
    conv        causal (`causal.py`), kernel_size k; by default its weight is W = g · V/‖V‖ per output channel [2]
    dropout     of whole channels
    x           (B, C, T)     B batch, C in_channels, T steps
    h_L         (B, O, T)     O = num_channels[-1]

An output hangs on the last 1 + 2·(k − 1)·(2^L − 1) steps: `receptive_field`.

[1] Bai, Kolter & Koltun 2018, https://arxiv.org/abs/1803.01271
[2] Salimans & Kingma 2016, https://arxiv.org/abs/1602.07868
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from orbit.core.names import did_you_mean
from orbit.model.conv.causal import CausalConv1d, Memory
from orbit.model.conv.parts import (
    Activation,
    Norm,
    check_input,
    make_activation,
    make_dropout,
    make_norm,
)
from orbit.model.errors import SettingError

NORMS = ("weight", "layer", "batch")


class TCN(nn.Module):
    """Temporal convolutional network.

    Args:
        in_channels: of the input.
        num_channels: the channels of each block, so that its length is the number of blocks.
        kernel_size: of every convolution.
        dropout: probability that a channel of a sequence is zeroed in training, after each convolution.
        norm: "weight" (weight normalisation), "layer" (over channels, step by step), "batch" (causal in `eval()` only:
            its statistics in training are of all steps), None, or a function `norm(channels) -> module`.
        activation: as for `ConvBlock`.

    Raises:
        SettingError: a setting outside its range, or a name that is not known.
        ShapeError (in forward): the input is not (B, in_channels, T).

    >>> tcn = TCN(2, [16] * 4, kernel_size=3)
    >>> tcn(torch.randn(1, 2, 100)).shape, tcn.receptive_field
    (torch.Size([1, 16, 100]), 61)
    """

    def __init__(
        self,
        in_channels: int,
        num_channels: Sequence[int],
        kernel_size: int = 3,
        dropout: float = 0.2,
        norm: Norm = "weight",
        activation: Activation = "relu",
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not num_channels:
            raise SettingError("num_channels is empty: give the channels of each block, say [64] * 6")
        if isinstance(norm, str) and norm not in NORMS:
            raise SettingError(
                f"norm {norm!r} is none of {', '.join(NORMS)}, None or a function norm(channels) -> module"
                f"{did_you_mean(norm, NORMS)}; one with statistics over time would show outputs the future"
            )
        super().__init__()
        channels = [in_channels, *num_channels]
        self.blocks = nn.ModuleList(
            (
                TemporalBlock(
                    before,
                    after,
                    kernel_size,
                    dilation=2**i,
                    dropout=dropout,
                    norm=norm,
                    activation=activation,
                    device=device,
                    dtype=dtype,
                )
                for i, (before, after) in enumerate(pairwise(channels))
            )
        )

    @property
    def receptive_field(self) -> int:
        """How many steps an output hangs on, its own among them."""
        return 1 + sum(conv.past for conv in self.modules() if isinstance(conv, CausalConv1d))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """`memory` goes on with a stream, chunk by chunk, as in `causal.py`."""
        for block in self.blocks:
            x = block(x, memory)
        return x


class TemporalBlock(nn.Module):
    """One block of a `TCN`: two causal convolutions around which the input is carried."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float,
        norm: Norm,
        activation: Activation,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        after = None if norm == "weight" else norm
        self.in_channels = in_channels
        self.conv1 = CausalConv1d(
            in_channels, out_channels, kernel_size, dilation=dilation, bias=after is None, **factory
        )
        self.conv2 = CausalConv1d(
            out_channels, out_channels, kernel_size, dilation=dilation, bias=after is None, **factory
        )
        self.norm1 = make_norm(after, out_channels, 1, **factory)
        self.norm2 = make_norm(after, out_channels, 1, **factory)
        self.act = make_activation(activation)
        self.dropout = make_dropout(dropout, nn.Dropout1d)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv1d(in_channels, out_channels, 1, **factory)
        self.weight_norm = norm == "weight"
        if self.weight_norm:
            for conv in (self.conv1, self.conv2):
                weight_norm(conv)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw normalised weights anew, as `nn.Conv1d` draws its own, which cannot reach g and V."""
        if self.weight_norm:
            for conv in (self.conv1, self.conv2):
                weight = torch.empty_like(conv.weight)
                conv.weight = nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        check_input(x, self.in_channels, 1, "TCN")
        h = self.dropout(self.act(self.norm1(self.conv1(x, memory))))
        h = self.dropout(self.act(self.norm2(self.conv2(h, memory))))
        return self.act(h + self.shortcut(x))

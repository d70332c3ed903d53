"""A convolution over time that never looks ahead.

    y[t] = b + Σ_i W[i] · x[s·t − d·(k − 1 − i)],  i = 0 … k−1,  with x[t] = 0 for t < 0

    x   (B, C, T)                T steps
    y   (B, O, ⌊(T − 1)/s⌋ + 1)  as long as x at stride 1
    W   (O, C/groups, k)         k kernel_size, d dilation, s stride
    b   (O)

So y[t] hangs on the last d·(k − 1) + 1 steps, and a stream is computed chunk by chunk from the last d·(k − 1) inputs:

    memory = {}
    for chunk in chunks:
        y = conv(chunk, memory)         # together, these are conv(torch.cat(chunks, dim=-1))
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orbit.model.conv.parts import check_channels, check_input, each
from orbit.model.errors import CacheError, ShapeError
from orbit.model.replay import current_pass

Memory: TypeAlias = dict[nn.Module, Tensor]
"""The last inputs of each causal convolution of a net; an empty one starts a stream."""


class CausalConv1d(nn.Conv1d):
    """`nn.Conv1d` with zeros before the start instead of around.

    Args:
        in_channels, out_channels: multiples of `groups`.
        kernel_size, stride, dilation, groups, bias: as for `nn.Conv1d`.

    Raises:
        SettingError: a setting outside its range.
        ShapeError (in forward): the input is not (B, in_channels, T), or a chunk is no multiple of the stride.
        CacheError (in forward): the memory is another batch's, or activation checkpointing runs the chunk again.

    >>> conv = CausalConv1d(2, 4, kernel_size=3, dilation=2)
    >>> x, memory = torch.randn(1, 2, 10), {}
    >>> steps = [conv(step, memory) for step in x.split(1, dim=-1)]
    >>> torch.allclose(torch.cat(steps, dim=-1), conv(x), atol=1e-6)
    True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_channels(groups, in_channels=in_channels, out_channels=out_channels)
        (kernel,), (step,) = each("kernel_size", kernel_size, 1), each("stride", stride, 1)
        (spread,) = each("dilation", dilation, 1)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            step,
            dilation=spread,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    @property
    def past(self) -> int:
        """How many inputs before its own an output needs: dilation·(kernel_size − 1)."""
        return self.dilation[0] * (self.kernel_size[0] - 1)

    def forward(self, input: Tensor, memory: Memory | None = None) -> Tensor:
        """Convolve `input`, which begins the stream, or goes on where `memory` ended. `memory` is brought up to date.

        Gradients flow through the memory; detach its values to cut a long stream.
        """
        check_input(input, self.in_channels, 1, "CausalConv1d")
        if memory is None:
            return super().forward(pad(input, (self.past, 0)))

        if input.shape[-1] % self.stride[0]:
            raise ShapeError(
                f"a chunk of {input.shape[-1]} steps is no multiple of stride {self.stride[0]}: "
                "the next one would begin between two outputs"
            )
        before = memory.get(self)
        if before is None:
            before = input.new_zeros(*input.shape[:-1], self.past)
        elif before.shape[0] != input.shape[0]:
            raise CacheError(
                f"the memory holds {before.shape[0]} rows and the chunk has {input.shape[0]}: "
                "begin another stream with an empty memory"
            )
        elif current_pass() not in (-1, getattr(before, "made_in_pass", -1)):
            raise CacheError(
                "the memory has gone on since this chunk: activation checkpointing runs it again in the backward pass. "
                "Run checkpointed layers without a memory, or make it inside the checkpointed function"
            )
        known = torch.cat((before, input), dim=-1)
        output = super().forward(known)
        last = known[..., known.shape[-1] - self.past :].clone()  # a view would keep the chunk
        if current_pass() != -1:
            last.made_in_pass = current_pass()  # type: ignore[attr-defined]
        memory[self] = last
        return output

"""The building blocks of `orbit.model`, one row each; `test_blocks.py` holds every row to every law.

A row says how to build a tiny block, what goes in, and which symmetries it has. A block that joins the table inherits
all laws; one that cannot keep a law says so in its row with `without`, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orbit.model.conv import TCN, CausalConv1d, ConvBlock, DepthwiseSeparableConv, ResBasicBlock
from orbit.model.film import FiLM
from orbit.model.gate import ContextGate, GLUGate, SigmoidGate, SoftmaxGate, TanhGate, TopKGate
from orbit.model.mlp import MLP
from orbit.model.moe import MoE, moe_aux_loss


def _call(block: Any, *inputs: Tensor) -> Tensor:
    return block(*inputs)


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        build: `build(device=..., dtype=...)` makes it; called under a fixed seed.
        inputs: makes its inputs, in float32, int64 or bool, rows first; called under a fixed seed.
        call: what of the block is under the laws: `call(block, *inputs)` -> one tensor, rows first.
        tokens: the dimension of first input and output along which a permutation is carried through, if any.
        causal: the dimension of first input and output along which nothing looks ahead, if any.
        without: the names of laws that it does not keep, each with the reason.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    call: Callable[..., Tensor] = _call
    tokens: int | None = None
    causal: int | None = None
    without: Mapping[str, str] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
        """The block, equal at each call. Weights that start at zero or one are moved, so that no law is empty."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            block = self.build(device=device, dtype=dtype)
            if device != "meta":
                with torch.no_grad():
                    for p in block.parameters():
                        p += 0.1 * torch.randn(p.shape, dtype=torch.float64).to(p)
        return block

    def batch(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Its inputs, equal at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs())


BLOCKS: dict[str, Block] = {}


def _image() -> tuple[Tensor, ...]:
    return (torch.randn(3, 4, 6, 5),)


def _signal() -> tuple[Tensor, ...]:
    return (torch.randn(3, 4, 12),)


BLOCKS.update(
    {
        "conv": Block(partial(ConvBlock, 4, 6), _image),
        "conv, pre-norm": Block(partial(ConvBlock, 4, 6, 5, pre_norm=True, norm="group"), _image),
        "conv 1d": Block(partial(ConvBlock, 4, 6, dim=1, norm="layer", activation="silu"), _signal),
        "conv 3d": Block(
            partial(ConvBlock, 4, 6, stride=2, dim=3, norm="instance", activation="gelu"),
            lambda: (torch.randn(2, 4, 5, 4, 6),),
        ),
        "causal conv": Block(partial(CausalConv1d, 4, 6, dilation=2, groups=2), _signal, causal=2),
        "depthwise separable conv": Block(partial(DepthwiseSeparableConv, 4, 6, stride=2), _image),
        "residual block": Block(partial(ResBasicBlock, 4, 4), _image),
        "residual block, projected": Block(partial(ResBasicBlock, 4, 6, stride=2, norm="group"), _image),
        "tcn": Block(partial(TCN, 4, (6, 6), dropout=0.0), _signal, causal=2),
        "tcn, layer norm": Block(partial(TCN, 4, (4, 6), dropout=0.0, norm="layer"), _signal, causal=2),
    }
)


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randn(3, 5, 8),)


BLOCKS.update(
    {
        "mlp": Block(partial(MLP, 8, 12, 6), _tokens, tokens=1),
        "mlp, gated": Block(partial(MLP, 8, gated=True, activation="silu", bias=False), _tokens, tokens=1),
        "experts": Block(partial(MoE, 8, 16, 4), _tokens, tokens=1),
        "experts, plain": Block(
            partial(MoE, 8, 6, 4, gated=False, activation="gelu", capacity_factor=1.0), _tokens, tokens=1
        ),
        "experts, their loss": Block(
            partial(MoE, 8, 16, 4),
            _tokens,
            call=lambda block, x: block(x) + moe_aux_loss(block, balance=1.0, z=1.0).to(x.dtype),
            without={
                law: "the loss is one number of the whole batch" for law in ("rows", "no_rows", "tokens")
            },
        ),
    }
)


def _tokens_and_context() -> tuple[Tensor, ...]:
    return torch.randn(3, 5, 8), torch.randn(3, 4)


BLOCKS.update(
    {
        "sigmoid gate": Block(partial(SigmoidGate, 8, 6), _tokens, tokens=1),
        "tanh gate": Block(partial(TanhGate, 8), _tokens, tokens=1),
        "softmax gate": Block(partial(SoftmaxGate, 8, 6, temperature=0.5), _tokens, tokens=1),
        "glu gate": Block(partial(GLUGate, 8, 6), _tokens, tokens=1),
        "context gate": Block(partial(ContextGate, 8, 4), _tokens_and_context, tokens=1),
        "top-k gate": Block(
            partial(TopKGate, 8, 4),
            _tokens,
            call=lambda gate, x: (gate(x).weights @ torch.ones(2, 1).to(gate(x).weights) + gate(x).logits).to(
                x.dtype
            ),
            tokens=1,
        ),
        "film": Block(partial(FiLM, 4, 8), _tokens_and_context, tokens=1),
        "film, channels first": Block(
            partial(FiLM, 4, 8, channel_dim=1), lambda: (torch.randn(3, 8, 5), torch.randn(3, 4)), tokens=2
        ),
    }
)

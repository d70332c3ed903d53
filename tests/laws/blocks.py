"""The building blocks of `orbit.model`, one row each; `test_blocks.py` holds every row to every law.

A row says how to build a tiny block, what goes in, and which symmetries it has. A block that joins the table inherits
all laws; one that cannot keep a law says so in its row with `without`, and why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orbit.model.attention import (
    MultiHeadAttention,
    RotaryPositionalEmbedding,
    SinusoidalPositionalEmbedding,
    rotate,
)
from orbit.model.conv import TCN, CausalConv1d, ConvBlock, DepthwiseSeparableConv, ResBasicBlock
from orbit.model.film import FiLM
from orbit.model.gate import ContextGate, GLUGate, SigmoidGate, SoftmaxGate, TanhGate, TopKGate
from orbit.model.mlp import MLP
from orbit.model.moe import MoE, moe_aux_loss
from orbit.model.patches import PatchEmbedding
from orbit.model.registry import build_model


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
            if device != "meta" and dtype != torch.float32:  # whose random numbers are others
                torch.manual_seed(11)
                block.load_state_dict(self.build(device=device, dtype=torch.float32).state_dict())
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
        "patch embedding": Block(partial(PatchEmbedding, 4, 6, (2, 5)), _image),
        "residual block": Block(partial(ResBasicBlock, 4, 4), _image),
        "residual block, projected": Block(partial(ResBasicBlock, 4, 6, stride=2, norm="group"), _image),
        "tcn": Block(partial(TCN, 4, (6, 6), dropout=0.0), _signal, causal=2),
        "tcn, layer norm": Block(partial(TCN, 4, (4, 6), dropout=0.0, norm="layer"), _signal, causal=2),
    }
)


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randn(3, 6, 8),)


def _context() -> tuple[Tensor, ...]:
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3, [False] * 4 + [True]])
    return torch.randn(3, 6, 8), torch.randn(3, 5, 10), real


def _padded() -> tuple[Tensor, ...]:
    return torch.randn(3, 6, 8), torch.tensor(
        [[True] * 6, [False] * 2 + [True] * 4, [True] * 4 + [False] * 2]
    )


def _causal(**settings: Any) -> Callable[..., nn.Module]:
    def build(device: Any = None, dtype: Any = None) -> nn.Module:
        rope = RotaryPositionalEmbedding(4)
        return MultiHeadAttention(
            8, 4, 2, head_dim=4, causal=True, rope=rope, **settings, device=device, dtype=dtype
        )

    return build


def _decode(block: Any, x: Tensor) -> Tensor:
    """A prompt, single tokens, and several at once."""
    cache = block.make_cache()
    return torch.cat([block(x[:, a:b], cache=cache) for a, b in ((0, 2), (2, 3), (3, 6))], 1)


def _no_parameters(block: nn.Module) -> Callable[..., nn.Module]:
    return lambda device=None, dtype=None: copy.deepcopy(block)


BLOCKS.update(
    {
        "attention": Block(partial(MultiHeadAttention, 8, 2, bias=True), _tokens, tokens=1),
        "attention, its weights": Block(
            partial(MultiHeadAttention, 8, 2),
            _tokens,
            lambda block, x: block(x, need_weights=True)[0],
            tokens=1,
        ),
        "attention, padded": Block(_causal(), _padded, lambda block, x, real: block(x, mask=real), causal=1),
        "attention, cross": Block(
            partial(MultiHeadAttention, 8, 4, 1, context_size=10),
            _context,
            lambda block, x, context, real: block(x, context, mask=real),
            tokens=1,
        ),
        "attention, cached": Block(_causal(), _tokens, _decode, causal=1),
        "attention, all settings": Block(
            _causal(window=3, qk_norm=True, output_gate=True, bias=True), _tokens, causal=1
        ),
        "rotary positions": Block(
            _no_parameters(RotaryPositionalEmbedding(8)),
            _tokens,
            lambda rope, x: rotate(x[:, None], rope(torch.arange(x.shape[1])))[:, 0],
            causal=1,
        ),
        "rotary positions, dynamic": Block(
            _no_parameters(
                RotaryPositionalEmbedding(
                    8, scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
                )
            ),
            _tokens,
            lambda rope, x: rotate(x[:, None], rope(torch.arange(x.shape[1])))[:, 0],
        ),
        "sinusoidal positions": Block(_no_parameters(SinusoidalPositionalEmbedding(8)), _tokens, causal=1),
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


def _decoder(**settings: Any) -> Callable[..., nn.Module]:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_layers": 2, "num_heads": 4, "intermediate_size": 16}
    return partial(build_model, "transformer", **{**sizes, "num_kv_heads": 2, "init_std": 0.2, **settings})


def _ids() -> tuple[Tensor, ...]:
    return (torch.randint(11, (3, 6)),)


def _block_of(model: Any, h_BTD: Tensor) -> Tensor:
    return model.blocks[0](h_BTD, model.model.rope(torch.arange(h_BTD.shape[1]), h_BTD.dtype))


def _tokens_and_context() -> tuple[Tensor, ...]:
    return torch.randn(3, 5, 8), torch.randn(3, 4)


BLOCKS.update(
    {
        "transformer": Block(
            _decoder(
                num_layers=1, tie_embeddings=True, qk_norm=True, window=3, attention_bias=True, mlp_bias=True
            ),
            _ids,
            call=lambda model, ids: model(ids).logits,
        ),
        "transformer of experts, its loss": Block(
            _decoder(num_layers=1, num_experts=4),
            _ids,
            call=lambda model, ids: model(ids, labels=ids).loss,
            without={
                law: "the loss is one number of the whole batch" for law in ("rows", "no_rows", "bfloat16")
            },
        ),
        "transformer block": Block(
            _decoder(num_layers=1),
            _tokens,
            call=_block_of,
            causal=1,
            without={"every_parameter_gets_a_gradient": "embedding and head are outside of the block"},
        ),
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

"""What the weights of a layer begin with, by its kind.

A layer cannot know which activation follows it, so the choice is made per kind: convolutions expect a ReLU-like unit
after them, linear layers (attention, gates and outputs as often as hidden layers) expect none.

    kind         layers                            weights                                      bias
    linear       Linear, Bilinear                  Glorot uniform, U(±√(6/(in+out))) [1]        0
    conv         Conv1d/2d/3d                      He normal, N(0, 2/fan), fan = in/g·∏k [2]    0
    conv         ConvTranspose1d/2d/3d             the same with fan = in/g·∏(k/s), the         0
                                                   number of terms in one output
    embedding    Embedding, EmbeddingBag           N(0, 0.02²) [3]; the padding row is 0
    norm         Layer-, RMS-, Group-, Batch-,     1; running statistics reset                  0
                 SyncBatch-, InstanceNorm
    attention    MultiheadAttention                Glorot uniform for each of q, k, v alone,    0
                                                   as three Linear layers would have it;
                                                   bias_k and bias_v Glorot normal
    recurrent    RNN, LSTM, GRU and their cells    per gate: input Glorot uniform, recurrent    0; 1 for an
                                                   orthogonal [4]; an LSTM's projection as      LSTM's forget
                                                   an input                                     gate [5]
    prelu        PReLU                             0.25 [2]

g = groups, k = kernel size, s = stride, in/out = channels or features.

[1] Glorot & Bengio 2010, eq. 16   [2] He et al. 2015, https://arxiv.org/abs/1502.01852, eq. 10
[3] Radford et al. 2019 (GPT-2)    [4] Saxe et al. 2014, https://arxiv.org/abs/1312.6120
[5] Jozefowicz et al. 2015; torch adds two biases, so b_ih carries the 1 and b_hh stays 0

Transformer layers, AdaptiveLogSoftmaxWithLoss and the like own nothing but such layers.

A block that owns further parameters (stacked experts, say) brings a rule of its own, by two things that its class has:
a name for its kind, `initialized_as = "experts"`, and `reset_parameters()`, which fills its own parameters and buffers
and leaves its children alone. That goes before the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

__all__ = ["Rule", "rule_of"]

Rule = Callable[[Any], None]


def rule_of(layer: nn.Module) -> tuple[str, Rule] | None:
    """The layer's kind and how to initialise it; None for an unknown class."""
    own_kind = getattr(type(layer), "initialized_as", None)
    if own_kind is not None:
        return own_kind, lambda block: block.reset_parameters()
    return next(((kind, rule) for kind, classes, rule in _KINDS if isinstance(layer, classes)), None)


def _linear(layer: nn.Linear | nn.Bilinear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    _zero(layer.bias)


def _conv(layer: _ConvNd) -> None:
    fan = layer.in_channels / layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        fan = max(1.0, fan / math.prod(layer.stride))
    nn.init.normal_(layer.weight, std=math.sqrt(2 / fan))
    _zero(layer.bias)


def _embedding(layer: nn.Embedding | nn.EmbeddingBag) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    if layer.padding_idx is not None:
        layer.weight[layer.padding_idx].zero_()


def _norm(layer: nn.Module) -> None:
    if isinstance(layer, _NormBase):
        layer.reset_running_stats()
    if isinstance(weight := getattr(layer, "weight", None), Tensor):
        weight.fill_(1.0)
    _zero(getattr(layer, "bias", None))


def _attention(layer: nn.MultiheadAttention) -> None:
    # out_proj is a Linear of its own and is initialised as one
    if layer.in_proj_weight is not None:
        projections = list(layer.in_proj_weight.chunk(3))
    else:
        projections = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    for weight in projections:
        nn.init.xavier_uniform_(weight)
    _zero(layer.in_proj_bias)
    for bias in (layer.bias_k, layer.bias_v):
        if bias is not None:
            nn.init.xavier_normal_(bias)


def _recurrent(layer: nn.RNNBase | nn.RNNCellBase) -> None:
    hidden = layer.hidden_size
    for name, p in layer.named_parameters(recurse=False):
        if name.startswith("weight_hh"):
            for gate in p.split(hidden):
                exact = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, torch.float32))
                gate.copy_(nn.init.orthogonal_(exact))  # QR has no half-precision kernels
        elif name.startswith("weight_ih"):
            for gate in p.split(hidden):
                nn.init.xavier_uniform_(gate)
        elif name.startswith("weight_hr"):
            nn.init.xavier_uniform_(p)
        else:
            p.zero_()
            if isinstance(layer, (nn.LSTM, nn.LSTMCell)) and name.startswith("bias_ih"):
                p[hidden : 2 * hidden] = 1.0  # gates lie in the order input, forget, cell, output


def _prelu(layer: nn.PReLU) -> None:
    layer.weight.fill_(0.25)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        bias.zero_()


_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...], Rule], ...] = (
    ("linear", (nn.Linear, nn.Bilinear), _linear),
    ("conv", (_ConvNd,), _conv),
    ("embedding", (nn.Embedding, nn.EmbeddingBag), _embedding),
    ("norm", (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase), _norm),
    ("attention", (nn.MultiheadAttention,), _attention),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase), _recurrent),
    ("prelu", (nn.PReLU,), _prelu),
)

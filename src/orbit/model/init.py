"""Initial weights by layer kind: `auto_initialize(model)`.

Every layer that is known below gets the scheme that the field uses for its kind. A layer cannot know which
activation follows it, so the choice is made per kind: convolutions expect a ReLU-like unit after them, linear
layers (attention, gates and outputs as often as hidden layers) expect none.

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

Left as they are, and named in the report: layers of any other class that own parameters (they know their own
initialisation), and layers whose own parameters are frozen, quantised or computed (parametrized, pruned).
Weights tied between layers are set once, by the embedding's rule where one of them is an embedding, so that a
tied output head does not undo it.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

__all__ = ["InitReport", "auto_initialize"]


@dataclass(frozen=True)
class InitReport:
    """What `auto_initialize` did.

    Attributes:
        counts: kind → number of layers initialised, kinds as in the table above.
        untouched: names of the parameters that were left as they are.
    """

    counts: dict[str, int]
    untouched: tuple[str, ...]


def auto_initialize(model: nn.Module) -> InitReport:
    """Initialise `model` in place, each layer by its kind; the table is at the top of this file.

    Draws from torch's global generator, layer by layer in a fixed order: seed first for reproducible weights.
    Prints nothing.

    Args:
        model: any module, on any device but meta.

    Returns:
        The number of layers initialised per kind, and the parameters left untouched.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a parameter or buffer has no storage yet (a lazy layer, or the meta device). Nothing was
            changed.

    Warns:
        UserWarning: the model has parameters but no layer that could be initialised, so nothing was done.

    >>> model = nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 10))
    >>> auto_initialize(model)
    InitReport(counts={'embedding': 1, 'norm': 1, 'linear': 1}, untouched=())
    >>> model[0].weight[0].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"auto_initialize() takes a torch.nn.Module, not {type(model).__name__}")
    _refuse_without_storage(model)

    counts: Counter[str] = Counter()
    done: set[nn.Parameter] = set()
    with torch.no_grad():
        for kind, rule, layer in _plan(model):
            own = list(layer.parameters(recurse=False))
            if own and done.issuperset(own):
                continue  # tied to a layer that came before
            tied = [(p, p.clone()) for p in own if p in done]
            rule(layer)
            for parameter, value in tied:
                parameter.copy_(value)
            done.update(own)
            counts[kind] += 1

    untouched = tuple(name for name, p in model.named_parameters() if p not in done)
    if untouched and not counts:
        warnings.warn(
            f"auto_initialize() did nothing: no layer of {type(model).__name__} is of a kind it initialises "
            f"and trainable; {len(untouched)} parameters keep their values ({untouched[0]}, ...)",
            stacklevel=2,
        )
    return InitReport(dict(counts), untouched)


Rule = Callable[[Any], None]


def _plan(model: nn.Module) -> list[tuple[str, Rule, nn.Module]]:
    """(kind, rule, layer) in the order to initialise: embeddings first, since they decide tied weights."""
    plan = [
        (kind, rule, layer)
        for layer in model.modules()
        for kind, classes, rule in _KINDS
        if isinstance(layer, classes) and _is_plain(layer)
    ]
    return sorted(plan, key=lambda step: step[0] != "embedding")  # stable: else the model's own order


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer owns something to initialise, trainable and stored rather than computed."""
    own = list(layer.parameters(recurse=False))
    # torch.nn.utils.parametrize keeps a submodule; weight_norm, spectral_norm and prune set a plain tensor
    computed = "parametrizations" in layer._modules or any(
        isinstance(v, Tensor) for v in vars(layer).values()
    )
    trainable = all(p.requires_grad and p.is_floating_point() for p in own)
    return trainable and not computed and bool(own or list(layer.buffers(recurse=False)))


def _refuse_without_storage(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        for name, tensor in chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False)):
            where = (
                f"{path}.{name} of {type(layer).__name__}" if path else f"{name} of {type(layer).__name__}"
            )
            if is_lazy(tensor):
                raise ValueError(
                    f"{where} has no shape yet: auto_initialize() needs a layer's sizes, and a lazy layer "
                    "learns them from its first batch; run model(example) once first"
                )
            if tensor.is_meta:
                raise ValueError(
                    f"{where} is on the meta device: auto_initialize() needs storage to fill; call "
                    "model.to_empty(device=...) first"
                )


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

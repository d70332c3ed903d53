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

Transformer layers, AdaptiveLogSoftmaxWithLoss and the like own nothing but such layers.

Blocks that own further parameters (stacked experts, say) take part by two things that their class offers: a name for
their kind, `initialized_as = "experts"`, and `reset_parameters()`, which fills their own parameters and buffers and
leaves their children's alone. It stands above the table.

Left as they are, and named in the report with the reason:

    loaded      what came from a file by `orbit.model.load_layer` or an Orbit checkpoint, or by transformers'
                `from_pretrained` (a head that it made anew is initialised); unless `overwrite_loaded=True`.
                There is no sign by which to know what a plain `load_state_dict` wrote, and a deep copy loses
                transformers' sign: name such layers in `keep=`.
    kept        what `keep=` names
    frozen, quantised, computed (parametrized, pruned), and layers of any other class: they know their own
                initialisation; adapters and what else hangs on a model

Weights tied between layers are set once, by the embedding's rule where one of them is an embedding, so that a
tied output head does not undo it.

`residual=` names the layers that write into a residual stream, whose variance grows with each of them. After its rule,
the weight of each is scaled by 1/√n [3], n being the number of layers that the names match: 2 · blocks in a decoder
whose blocks each have one after attention and one after the MLP. Where several write side by side (experts), n is to be
said: `residual_depth=`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from orbit.core.loaded import loaded_names
from orbit.core.patterns import matches
from orbit.core.runtime import unwrap
from orbit.core.tree import tree
from orbit.model.errors import SettingError, TargetError
from orbit.model.freeze import select

__all__ = ["InitReport", "auto_initialize"]


@dataclass(frozen=True)
class InitReport:
    """What `auto_initialize` did.

    Attributes:
        counts: kind → number of layers initialised, kinds as in the table above.
        untouched: name of each parameter that was left as it was → the reason.
        scaled: name of each weight that was scaled for the residual stream → its factor.
    """

    counts: dict[str, int]
    untouched: dict[str, str]
    scaled: dict[str, float]

    def __str__(self) -> str:
        done = ", ".join(f"{count} {kind}" for kind, count in self.counts.items()) or "nothing"
        lines = [f"initialised {done}"]
        if self.scaled:
            factors = " and ".join(f"{factor:.3g}" for factor in sorted(set(self.scaled.values())))
            lines.append(f"scaled {len(self.scaled)} by {factors}: {_some(self.scaled)}")
        for reason in dict.fromkeys(self.untouched.values()):
            names = [name for name, why in self.untouched.items() if why == reason]
            lines.append(f"left {len(names)} ({reason}): {_some(names)}")
        return "\n".join(lines)


def auto_initialize(
    model: nn.Module,
    *,
    residual: str | Sequence[str] = (),
    residual_depth: int | None = None,
    keep: str | Sequence[str] = (),
    overwrite_loaded: bool = False,
) -> InitReport:
    """Initialise `model` in place, each layer by its kind; the table is at the top of this file.

    Draws from torch's global generator, layer by layer in a fixed order: seed first for reproducible weights.
    Prints nothing.

    Args:
        model: any module, on any device but meta.
        residual: layers, or weights of blocks, that write into a residual stream, as in `freeze_layers`:
            ("o_proj", "down_proj") of a Llama, ("out_proj", "linear2") of `nn.TransformerEncoder`.
        residual_depth: how many of them add to the stream one after the other; None: as many as `residual` matches.
        keep: layers or parameters to leave as they are, as in `freeze_layers`.
        overwrite_loaded: initialise also what is known to have been loaded.

    Returns:
        The number of layers initialised per kind, the parameters left untouched, and those scaled.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a parameter or buffer has no storage yet (a lazy layer, or the meta device).
        TargetError: a name that matches nothing, or in `residual` a module without a weight of its own.
        SettingError: `residual_depth` below 1, or without `residual`.
        Nothing was changed then.

    Warns:
        UserWarning: the model has parameters but no layer that could be initialised, so nothing was done.

    >>> model = nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 10))
    >>> print(auto_initialize(model))
    initialised 1 embedding, 1 norm, 1 linear
    >>> model[0].weight[0].tolist()
    [0.0, 0.0, 0.0, 0.0]
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=4)
    >>> print(auto_initialize(encoder, residual=("out_proj", "linear2")))
    initialised 4 attention, 12 linear, 8 norm
    scaled 8 by 0.354: layers.0.self_attn.out_proj.weight, layers.0.linear2.weight, ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"auto_initialize() takes a torch.nn.Module, not {type(model).__name__}")
    model = unwrap(model)
    _refuse_without_storage(model)
    modules, _ = tree(model)
    factors = _residual_factors(model, modules, residual, residual_depth)
    kept = {id(p) for p in select(model, keep).values()} if keep else set()
    reasons = _reasons(modules.values(), kept, overwrite_loaded)

    counts: Counter[str] = Counter()
    done: set[int] = set()
    with torch.no_grad():
        for kind, rule, layer in _plan(modules.values()):
            own = list(layer.parameters(recurse=False))
            aside = [p for p in own if id(p) in done or id(p) in reasons]
            if len(aside) == len(own) and (own or (loaded_names(layer) and not overwrite_loaded)):
                continue  # tied to a layer that came before, or to be left alone
            values = [p.clone() for p in aside]
            rule(layer)
            for parameter, value in zip(aside, values, strict=True):
                parameter.copy_(value)
            done.update(id(p) for p in own if id(p) not in reasons)
            counts[kind] += 1
        names = dict(model.named_parameters())
        scaled = {name: factors[id(p)] for name, p in names.items() if id(p) in factors and id(p) in done}
        for name, factor in scaled.items():
            names[name].mul_(factor)

    known = {id(p): _why(layer) for layer in modules.values() for p in layer.parameters(recurse=False)}
    untouched = {
        name: reasons.get(id(p)) or known.get(id(p), "attached to the model")
        for name, p in names.items()
        if id(p) not in done
    }
    if untouched and not counts:
        name, reason = next(iter(untouched.items()))
        warnings.warn(
            f"auto_initialize() did nothing: {len(untouched)} parameters of {type(model).__name__} keep their values "
            f"({name}, ...: {reason})",
            stacklevel=2,
        )
    return InitReport(dict(counts), untouched, scaled)


def _residual_factors(
    model: nn.Module, modules: dict[str, nn.Module], residual: str | Sequence[str], depth: int | None
) -> dict[int, float]:
    """id of each weight that writes into the residual stream → what it is scaled by."""
    targets = [residual] if isinstance(residual, str) else list(residual)
    if depth is not None and (not targets or depth < 1):
        raise SettingError(
            f"residual_depth={depth}: it must be at least 1, and residual= must name the layers that write into the "
            "residual stream"
        )
    weights: dict[int, None] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target in targets:
        found = matches(target, [*modules, *parameters], TargetError)
        for name in found:
            weight = parameters[name] if name in parameters else modules[name]._parameters.get("weight")
            if weight is None:
                raise TargetError(
                    f"residual={target!r} names {name!r}, a {type(modules[name]).__name__} without a weight of its "
                    "own: name the layers in it that write into the residual stream, or the weights"
                )
            weights[id(weight)] = None
        if not found:
            select(model, target)  # raises, with the nearest name
    return dict.fromkeys(weights, 1 / math.sqrt(depth or len(weights))) if weights else {}


def _reasons(modules: Iterable[nn.Module], kept: set[int], overwrite_loaded: bool) -> dict[int, str]:
    """id of each parameter to leave alone for what it holds → the reason."""
    reasons = dict.fromkeys(kept, "kept")
    for layer in modules:
        ours = loaded_names(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            loaded = name in ours or getattr(parameter, "_is_hf_initialized", False)
            if loaded and not overwrite_loaded:
                reasons.setdefault(id(parameter), "loaded")
    return reasons


def _why(layer: nn.Module) -> str:
    """Why `_plan` has left out the layer."""
    if _rule_of(layer) is None:
        return f"of class {type(layer).__name__}"
    own = list(layer.parameters(recurse=False))
    if not all(p.is_floating_point() for p in own):
        return "quantised"
    return "computed" if all(p.requires_grad for p in own) else "frozen"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


Rule = Callable[[Any], None]


def _plan(modules: Iterable[nn.Module]) -> list[tuple[str, Rule, nn.Module]]:
    """(kind, rule, layer) in the order to initialise: embeddings first, since they decide tied weights."""
    plan = [(*rule, layer) for layer in modules if (rule := _rule_of(layer)) is not None and _is_plain(layer)]
    return sorted(plan, key=lambda step: step[0] != "embedding")  # stable: else the model's own order


def _rule_of(layer: nn.Module) -> tuple[str, Rule] | None:
    """The layer's kind and how to initialise it; None for an unknown class."""
    own_kind = getattr(type(layer), "initialized_as", None)
    if own_kind is not None:
        return own_kind, type(layer).reset_parameters
    return next(((kind, rule) for kind, classes, rule in _KINDS if isinstance(layer, classes)), None)


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

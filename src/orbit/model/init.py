"""Initial weights for a whole model: `auto_initialize(model)`.

Each layer gets the weights of its kind (`init_rules.py` has the table: every class of `torch.nn` that owns parameters,
and blocks that bring a rule of their own).

Left as they are, and named in the report with the reason:

    loaded      what came by `load_layer`, `load_llama_weights` or an Orbit checkpoint, or by transformers'
                `from_pretrained` (a head that it made anew is initialised); unless `overwrite_loaded=True`.
                There is no sign by which to know what a plain `load_state_dict` wrote, and a deep copy loses
                transformers' sign: name such layers in `keep=`.
    kept        what `keep=` names
    frozen, quantised, computed (parametrized, pruned), and layers of any other class: they know their own
                initialisation; adapters and what else hangs on a model

Weights tied between layers are set once, by the embedding's rule where one of them is an embedding, so that a
tied output head does not undo it.

`residual=` names the layers that write into a residual stream, whose variance grows with each of them. After its rule,
the weight of each is scaled by 1/√n (Radford et al. 2019, GPT-2), n being the number of layers that the names match:
2 · blocks in a decoder whose blocks each have one after attention and one after the MLP. Where several write side by
side (experts), n is to be said: `residual_depth=`.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from orbit.core.loaded import loaded_names
from orbit.core.patterns import matches
from orbit.core.runtime import unwrap
from orbit.core.tree import tree
from orbit.model.errors import SettingError, TargetError
from orbit.model.freeze import select
from orbit.model.init_rules import Rule, rule_of

__all__ = ["InitReport", "auto_initialize"]


@dataclass(frozen=True)
class InitReport:
    """What `auto_initialize` did.

    Attributes:
        counts: kind → number of layers initialised, kinds as in the table of `init_rules.py`.
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
    """Initialise `model` in place, each layer by its kind; `init_rules.py` has the table.

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
    if rule_of(layer) is None:
        return f"of class {type(layer).__name__}"
    own = list(layer.parameters(recurse=False))
    if not all(p.is_floating_point() for p in own):
        return "quantised"
    return "computed" if all(p.requires_grad for p in own) else "frozen"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _plan(modules: Iterable[nn.Module]) -> list[tuple[str, Rule, nn.Module]]:
    """(kind, rule, layer) in the order to initialise: embeddings first, since they decide tied weights."""
    plan = [(*rule, layer) for layer in modules if (rule := rule_of(layer)) is not None and _is_plain(layer)]
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

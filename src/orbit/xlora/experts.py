"""Which layers may carry the experts of a mixture.

A scaling belongs to a token. So a layer with experts must answer every position (batch, sequence) by itself:

    y = y₀ + Σ_i s_i·(y_i − y₀)       y_i: the layer's output under expert i alone, y₀: under none

    LoRA              y_i − y₀ = g·s·B_i A_i x                                Linear, Conv1D of transformers; for
    DoRA              y_i − y₀ = (m_i∘(W + ΔW_i)/‖W + ΔW_i‖ − W)·x            Embedding x is one-hot
    a bias of its own            + b_i − b
    token rows        y_i − y₀ = rowᵢ − W[token] for the tokens that have one
    a saved module    y_i = module_i(x), a norm or a head, say

Each DoRA expert is normalised by itself, as it was trained: it is the same at s = 1 as alone, and experts that rest
change nothing. Other layers are refused when the mixture is made:

    convolutions                 they mix positions; one scaling per sample, the mean over its tokens, would let a
                                 token depend on later ones, and no cache could hold what it made
    attention and parameters     (`nn.MultiheadAttention`, experts of an MoE) run as a whole with other weights
    modules that keep a cache    each expert's copy would write its keys and values to the same one
    towers beside the decoder    their patches and frames are not the tokens that have scalings
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from torch import nn

from orbit.adapter.graft import Graft
from orbit.adapter.kinds.conv import ConvGraft
from orbit.adapter.kinds.whole import ParameterSite
from orbit.adapter.owners import AnySlot, ModuleSlot, Whole
from orbit.xlora.errors import XLoRAError


def expert_layers(model: nn.Module, experts: Sequence[str]) -> dict[str, Graft]:
    """The layers that carry an expert, by dotted name, in the order of the scalings' third axis."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Graft) and not module.slots().keys().isdisjoint(experts)
    }


def check_layers(model: nn.Module, experts: Sequence[str], decoder: nn.Module) -> None:
    """XLoRAError for the first layer that the module's table refuses."""
    apart = set(_beside(model, decoder))
    for path, layer in expert_layers(model, experts).items():
        for expert in experts:
            if expert in layer.slots():
                why = _refusal(layer, layer.slots()[expert])
                why = f"it lies outside of the {type(decoder).__name__}" if layer in apart else why
                if why is not None:
                    raise XLoRAError(
                        f"expert {expert!r} adapts {path!r}, which has no scaling per token: {why}. Make the expert "
                        "without this layer"
                    )


def _refusal(layer: Graft, slot: AnySlot) -> str | None:
    if isinstance(layer, ConvGraft):
        return "a convolution mixes positions"
    if isinstance(layer, ParameterSite) or isinstance(slot, Whole):
        return "it is run as a whole with other weights"
    if (
        isinstance(slot, ModuleSlot)
        and "past_key_values" in inspect.signature(slot.module.forward).parameters
    ):
        return (
            f"a saved {type(slot.module).__name__} would keep keys and values in the cache of the model's own"
        )
    return None


def _beside(model: nn.Module, decoder: nn.Module) -> Iterator[nn.Module]:
    """What is in the body of the model, or in it and not in its head if it has no body of its own, but no decoder."""
    body = getattr(model, "base_model", model)
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    inside = set(decoder.modules()) | set(head.modules() if isinstance(head, nn.Module) else ())
    return (module for module in body.modules() if module not in inside)

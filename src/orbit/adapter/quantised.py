"""Layers that keep their weight quantised: torchao's tensors, bitsandbytes' Linear4bit and Linear8bitLt.

    y = base + (C∘(x·Aᵀ))·Bᵀ          base: the layer's own forward, on whatever kernel it has

Only DoRA's norm and the inits that start from the weight need W itself, dequantised. It is not taken from the
layer's forward: LLM.int8 quantises what it is multiplied by, and Linear4bit settles its compute dtype by the
first input that it sees.

On CPUs with AVX512-BF16, Linear4bit packs its weight for inference when it first runs in eval mode, and from then
on passes no gradient to its input, also back in train mode (bitsandbytes 0.50): whatever is trained before it gets
none. So in a model with tasks no layer packs, and one in which a layer was packed before is refused.

bitsandbytes is not imported here: who has such a layer has imported it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from orbit.adapter.errors import GraftError

_PACKS = "support_avx512bf16_for_cpu"  # Linear4bit packs where this is true
_PACKED_BEFORE = "_orbit_packs"


def dequantised(layer: nn.Module) -> Tensor | None:
    """The weight of a quantised layer as a plain tensor in the weight's shape, None where that is not known."""
    W = layer._parameters.get("weight")
    if W is None:
        return None
    with torch.no_grad():
        if _is_a(layer, "Linear4bit"):
            state = getattr(W, "quant_state", None) or layer.quant_state
            return sys.modules["bitsandbytes"].functional.dequantize_4bit(W.data, state)
        if _is_a(layer, "Linear8bitLt"):  # whose weight is a plain Parameter once it was pickled
            own = W.data.as_subclass(Tensor)
            if own.is_floating_point():
                return own
            scale: Tensor = W.SCB if layer.state.SCB is None else layer.state.SCB  # type: ignore
            return own.to(scale.dtype) * (scale[:, None] / 127)
        if type(W).dequantize is not Tensor.dequantize:  # torchao's, and whoever follows it
            return W.dequantize()
    return None


def refuse_packed(model: nn.Module) -> None:
    """Raise GraftError if a layer was packed for inference, so that no gradient passes through it."""
    for path, layer in model.named_modules():
        if not _is_a(layer, "Linear4bit"):
            continue
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise GraftError(
                f"bitsandbytes packed the weight of {path!r} for inference when it first ran in eval mode, and passes "
                f"no gradient through it any more; inject before the model runs, or set {_PACKS}=False on its layers"
            )


def never_pack(model: nn.Module) -> None:
    """Keep the layers of a model from packing their weights."""
    for layer in model.modules():
        if getattr(layer, _PACKS, False):
            layer.__dict__.update({_PACKED_BEFORE: True, _PACKS: False})


def may_pack(model: nn.Module) -> None:
    """Undo `never_pack`."""
    for layer in model.modules():
        if layer.__dict__.pop(_PACKED_BEFORE, False):
            layer.__dict__[_PACKS] = True


def _is_a(layer: nn.Module, name: str) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(layer, getattr(library.nn, name))

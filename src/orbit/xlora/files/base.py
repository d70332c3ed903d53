"""For which model a mixture was made: a fingerprint that holds no path and no weight.

    class          LlamaForCausalLM
    hidden_size    of the last hidden state, which the classifier reads
    layers         how many carry experts
    layers_sha256  of their names and shapes, in the order of the scalings' third axis

The same model passes quantised, in another dtype or on another device; its fine-tuned sisters pass too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from orbit.adapter.graft import Graft
from orbit.adapter.kinds.registry import own_class
from orbit.core.patterns import clean
from orbit.xlora.errors import XLoRAError


def fingerprint(cls: type[nn.Module], hidden_size: int, layers: Mapping[str, Graft]) -> dict[str, Any]:
    """Of a model whose own class is `cls` and whose `layers`, by name, carry experts."""
    return {"class": cls.__name__, "hidden_size": hidden_size, **_of_layers(layers)}


def check_base(folder: Path, base: Mapping[str, Any], model: nn.Module, hidden_size: int) -> None:
    """Is this the model of a fingerprint, as far as it can be told without the experts?

    Raises:
        XLoRAError: it is another class or of another size.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    if base.get("class") not in names:
        raise XLoRAError(f"{folder} is a mixture over a {base.get('class')}, and the model is a {names[0]}")
    if base.get("hidden_size") != hidden_size:
        raise XLoRAError(
            f"{folder} is a mixture over a {names[0]} of hidden size {base.get('hidden_size')}, and the model's is "
            f"{hidden_size}"
        )


def check_layers(folder: Path, base: Mapping[str, Any], layers: Mapping[str, Graft]) -> None:
    """Do the experts, now that they are loaded, lie on the layers of a fingerprint?

    Raises:
        XLoRAError: they lie on others, or on the same of other shapes.
    """
    now = _of_layers(layers)
    if any(base.get(key) != value for key, value in now.items()):
        raise XLoRAError(
            f"{folder} mixes experts on {base.get('layers')} layers; these lie on {now['layers']}, or on others of the "
            "same number: they, or the model, are not those that the mixture was saved with"
        )


def _of_layers(layers: Mapping[str, Graft]) -> dict[str, Any]:
    shapes = "".join(f"{clean(path)} {_shape(layer)}\n" for path, layer in layers.items())
    return {"layers": len(layers), "layers_sha256": hashlib.sha256(shapes.encode()).hexdigest()}


def _shape(layer: Graft) -> str:
    """(out, in) as the layer's settings tell it, for a weight that is packed has other shapes; or what it is."""
    has_matrix = type(layer).matrix_shape is not Graft.matrix_shape
    return str(layer.matrix_shape()) if has_matrix else own_class(layer).__name__

"""The classifier's tensors, as the implementations name them.

here           layers.0.weight, layers.0.bias, …      the index counts ReLU and Dropout too
PEFT           base_model.internal_xlora_classifier.layers.0.weight, …
the public one inner.0.weight, …, last.weight         `inner` counts a Dropout also where p = 0
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orbit.adapter.files import WEIGHTS
from orbit.core.checkpoint import screen
from orbit.core.safetensors_header import check_header
from orbit.xlora.classifier import Classifier
from orbit.xlora.errors import XLoRAError

PEFT_PREFIX = "base_model.internal_xlora_classifier."
_PUBLIC = re.compile(r"(?:inner\.(\d+)|last)\.(weight|bias)")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a `.pt` or `.bin` file, of which nothing but tensors is unpickled.

    Raises:
        XLoRAError: absent, unreadable, or with values that are not finite numbers.
    """
    if not path.is_file():
        raise XLoRAError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            check_header(path)
            tensors = load_file(path)
        else:
            screen(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise XLoRAError(f"{path} cannot be read: {error}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise XLoRAError(f"{path} must hold tensors by name")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise XLoRAError(f"{path}: {key} holds values that are not finite numbers")
    return tensors


def fill(classifier: Classifier, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy a file's tensors into a new classifier, which takes their dtype too if they come from here.

    Raises:
        XLoRAError: a tensor is missing, unexpected or of another shape.
    """
    ours = all(key.startswith("layers.") for key in tensors)
    theirs = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in _renamed(classifier, tensors).items()}
    own = classifier.state_dict()
    missing = [key for key in own if key not in theirs]
    if missing:
        why = ""
        if path.stem == Path(WEIGHTS).stem:
            why = (
                ": PEFT leaves layers of it out when it saves, those whose number is also the name of an expert "
                "(layers.0 is taken for a part of expert 0); write the file from the model's state_dict() instead"
            )
        raise XLoRAError(f"{path}: the classifier's {missing[0]} is missing{why}")
    for key, tensor in theirs.items():
        if key not in own:
            raise XLoRAError(f"{path}: {key} is unexpected: a classifier with these settings has {list(own)}")
        if tensor.shape != own[key].shape:
            layers = f" × {classifier.n_layers} layers" if classifier.layerwise else ""
            raise XLoRAError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, and the classifier of these settings, over "
                f"{classifier.n_experts} experts{layers}, has {tuple(own[key].shape)}"
            )
    dtypes = {tensor.dtype for tensor in theirs.values()}
    if ours and len(dtypes) == 1:
        classifier.to(dtypes.pop())
    classifier.load_state_dict(theirs)


def _renamed(classifier: Classifier, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public implementation's tensors under our names, the n-th Linear there being the n-th here."""
    matches = {key: _PUBLIC.fullmatch(key) for key in tensors}
    if not tensors or not all(matches.values()):
        return dict(tensors)
    linears = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    inner = sorted({int(match[1]) for match in matches.values() if match and match[1]})
    places = {number: f"layers.inner.{number}" for number in inner} | dict(
        zip(inner, linears[:-1], strict=False)
    )
    return {
        f"{places[int(match[1])] if match[1] else linears[-1]}.{match[2]}": tensors[key]
        for key, match in matches.items()
        if match
    }

"""Activations by name, each with its derivative: φ and dφ/dz.

    relu        max(0, z)
    gelu        z·Φ(z)                      Φ the normal distribution function [1]
    gelu_tanh   its tanh approximation      (GPT-2; transformers' "gelu_new", "gelu_pytorch_tanh")
    silu        z·σ(z)                      (swish)
    tanh, sigmoid

[1] Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orbit.core.names import did_you_mean
from orbit.model.errors import SettingError

__all__ = ["ACTIVATIONS", "Activation", "activation_of"]

_aten = torch.ops.aten


class Activation(NamedTuple):
    """φ(z), and backward(d, z) = d·φ'(z)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, lambda d, z: _aten.threshold_backward(d, z, 0)),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(_aten.gelu_backward, approximate="tanh")
    ),
    "silu": Activation(F.silu, _aten.silu_backward),
    "tanh": Activation(torch.tanh, lambda d, z: _aten.tanh_backward(d, z.tanh())),
    "sigmoid": Activation(torch.sigmoid, lambda d, z: _aten.sigmoid_backward(d, z.sigmoid())),
}


def activation_of(name: str) -> Activation:
    """The activation of this name.

    Raises:
        SettingError: no activation has this name.
    """
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise SettingError(f"activation={name!r} is none of {known}{did_you_mean(str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]

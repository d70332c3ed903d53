"""The settings of a mixture, under the names of the public implementations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from orbit.xlora.errors import XLoRAError


@dataclass(frozen=True)
class xLoRAConfig:
    """How a classifier turns hidden states into scalings of the experts. `dataclasses.replace` changes a copy.

    Attributes:
        hidden_size: of the model's last hidden state.
        device: where the classifier lies; None is where the model is.
        adapters: name → folder of every expert, where they are not given to `add_xlora_to_model`.
        enable_softmax: softmax over the experts.
        enable_softmax_topk: another softmax over those that `top_k_lora` has left.
        softmax_temperature: T > 0 of the first softmax: softmax(logits / T).
        layerwise_scalings: scalings for every adapted layer, instead of one vector for all.
        top_k_lora: how many experts a token keeps at a layer, the rest get 0; None is all.
        xlora_depth: the number of Linear layers of the classifier, ≥ 1.
        xlora_size: its width, where it has a depth over 1.
        enable_relu_and_dropout: ReLU and dropout between its layers.
        use_bias: of its layers.
        xlora_dropout_p: of its dropout.
        use_trainable_adapters: train the experts too.
        scaling_pass_value: by what all experts are scaled in the scaling pass; 0 is the base model.
        global_scaling_weight: what every scaling is multiplied by in the end.

    Raises:
        XLoRAError: a value that no mixture can have.
    """

    hidden_size: int
    device: torch.device | str | None = None
    adapters: Mapping[str, str | os.PathLike[str]] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    softmax_temperature: float = 1.0
    layerwise_scalings: bool = False
    top_k_lora: int | None = None
    xlora_depth: int = 1
    xlora_size: int = 2048
    enable_relu_and_dropout: bool = True
    use_bias: bool = True
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "xlora_depth", "xlora_size"):
            self._require(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "an integer ≥ 1")
        top_k = self.top_k_lora
        self._require(
            "top_k_lora", top_k is None or (_is_int(top_k) and top_k >= 1), "None or an integer ≥ 1"
        )
        for name in ("scaling_pass_value", "global_scaling_weight"):
            self._require(name, _is_finite(getattr(self, name)), "a finite number")
        T = self.softmax_temperature
        self._require("softmax_temperature", _is_finite(T) and T > 0, "a finite number over 0")
        p = self.xlora_dropout_p
        self._require(
            "xlora_dropout_p", _is_finite(p) and 0 <= p < 1, "a probability, at least 0 and under 1"
        )

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise XLoRAError(f"xLoRAConfig({name}={getattr(self, name)!r}): it must be {rule}")

    def as_plain(self) -> dict[str, Any]:
        """The settings as JSON has them, without the device and the paths, which belong to a machine."""
        plain = asdict(self)
        del plain["device"], plain["adapters"]
        return plain


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

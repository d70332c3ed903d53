"""Writing a mixture so that PEFT's own loader reads it.

    adapter_config.json         peft_type XLORA; "adapters" maps "0", "1", … to folders, as PEFT finds them from its
                                working directory: those given here, joined to the folder that was given
    adapter_model.safetensors   base_model.internal_xlora_classifier.layers.0.weight, …
    adapters/0/, adapters/1/, … the experts

PEFT's own save drops layers of the classifier, its load takes all that there are. It asks for a base model whose config
has `use_cache=False`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from orbit.adapter.files import contents, packed, whole
from orbit.adapter.inject import task_config, task_layers
from orbit.core.patterns import clean
from orbit.xlora.errors import XLoRAError
from orbit.xlora.files.weights import PEFT_PREFIX

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

_ALWAYS = ("use_bias", "enable_relu_and_dropout")  # no settings of PEFT's, whose classifier has them


def peft_files(model: xLoRAModel, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files, the config last.

    Raises:
        XLoRAError: PEFT cannot hold the mixture.
    """
    refuse_for_peft(model)
    folders = {str(place): f"adapters/{place}" for place in range(len(model.xlora_experts))}
    for name, below in zip(model.xlora_experts, folders.values(), strict=True):
        for file, content in packed(*contents(model, name, peft=True)):
            yield f"{below}/{file}", content
    state = model.xlora_classifier.state_dict()
    fields = model.xlora_config.as_plain()
    for name in _ALWAYS:
        del fields[name]
    fields |= {
        "peft_type": "XLORA",
        "task_type": "CAUSAL_LM",
        "adapters": {name: str(folder / below) for name, below in folders.items()},
    }
    weights = {f"{PEFT_PREFIX}{key}": whole(tensor).cpu().contiguous() for key, tensor in state.items()}
    yield from packed(json.dumps(fields, indent=2), weights)


def refuse_for_peft(model: xLoRAModel) -> None:
    """Raise XLoRAError, saying why, for a mixture that PEFT has no place for."""
    config = model.xlora_config
    if not config.use_bias:
        raise _refused("its classifier always has biases, and use_bias=False")
    if not config.enable_relu_and_dropout and config.xlora_depth > 1:
        raise _refused("its classifier always has ReLU, and enable_relu_and_dropout=False")
    if differs_in_scaling_pass(config.as_plain()):
        raise _refused(
            "it applies top_k_lora and enable_softmax_topk in the scaling pass too, where here every expert takes part "
            f"by scaling_pass_value={config.scaling_pass_value}"
        )
    for name in model.xlora_experts:
        adapter = task_config(model, name)
        if adapter.dora:
            raise _refused(f"it has no DoRA experts, and {name!r} is one")
        if adapter.bias != "none" or adapter.tokens or adapter.save_modules or adapter.parameters:
            raise _refused(f"its experts are low-rank updates of layers, and {name!r} has more")
        for path, layer in task_layers(model, name).items():
            if not clean(path).startswith("model."):
                raise _refused(
                    f"it finds layers below `model` alone, and expert {name!r} is on {clean(path)}"
                )
            if not isinstance(layer, (nn.Linear, nn.Embedding)):
                raise _refused(f"it mixes no {type(layer).__name__}, and expert {name!r} is on {clean(path)}")


def differs_in_scaling_pass(settings: Mapping[str, Any]) -> bool:
    """Would PEFT, and the public implementation, choose among the experts in the scaling pass?"""
    chooses = settings.get("top_k_lora") is not None or settings.get("enable_softmax_topk")
    return bool(settings.get("scaling_pass_value") and chooses)


def _refused(why: str) -> XLoRAError:
    return XLoRAError(
        f"the mixture cannot be written for PEFT: {why}; save_pretrained(folder) writes it whole"
    )

"""Building blocks, and what works on any `nn.Module`. And, as an index, document 000's adapted layers."""

from typing import TYPE_CHECKING, Any

from orbit.model.count import count_params
from orbit.model.freeze import freeze_layers, get_trainable_params, unfreeze_layers
from orbit.model.init import auto_initialize
from orbit.model.layer_io import get_model_by_name, load_layer, save_layer

if TYPE_CHECKING:
    from orbit.adapter.layers import Conv1dLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA

__all__ = [
    "Conv1dLoRA",
    "Conv2dLoRA",
    "EmbeddingLoRA",
    "LinearLoRA",
    "auto_initialize",
    "count_params",
    "freeze_layers",
    "get_model_by_name",
    "get_trainable_params",
    "load_layer",
    "save_layer",
    "unfreeze_layers",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orbit.adapter import layers

    return getattr(layers, name)


def __dir__() -> list[str]:
    return __all__

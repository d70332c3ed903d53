"""Building blocks, and what works on any `nn.Module`. As an index, document 000's adapted layers too."""

from typing import TYPE_CHECKING, Any

from orbit.model.attention import (
    KVCache,
    MultiHeadAttention,
    RotaryPositionalEmbedding,
    Rotation,
    SinusoidalPositionalEmbedding,
    rotate,
)
from orbit.model.init import auto_initialize
from orbit.model.mask import (
    make_causal_mask,
    make_lookahead_mask,
    make_padding_mask,
    make_sliding_window_mask,
    positions_from_mask,
)

if TYPE_CHECKING:
    from orbit.adapter.layers import Conv1dLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA

__all__ = [
    "Conv1dLoRA",
    "Conv2dLoRA",
    "EmbeddingLoRA",
    "KVCache",
    "LinearLoRA",
    "MultiHeadAttention",
    "RotaryPositionalEmbedding",
    "Rotation",
    "SinusoidalPositionalEmbedding",
    "auto_initialize",
    "make_causal_mask",
    "make_lookahead_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "positions_from_mask",
    "rotate",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orbit.adapter import layers

    return getattr(layers, name)


def __dir__() -> list[str]:
    return __all__

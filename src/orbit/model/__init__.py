"""Building blocks, and what works on any `nn.Module`. And, as an index, document 000's adapted layers."""

from typing import TYPE_CHECKING, Any

from orbit.model.conv import TCN, CausalConv1d, ConvBlock, DepthwiseSeparableConv, ResBasicBlock
from orbit.model.init import auto_initialize
from orbit.model.patches import (
    PatchEmbedding,
    PatchOutput,
    pad_to_patch_size,
    patchify,
    reconstruct_from_patches,
    split_to_patches,
    unpatchify,
)

if TYPE_CHECKING:
    from orbit.adapter.layers import Conv1dLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA

__all__ = [
    "TCN",
    "CausalConv1d",
    "Conv1dLoRA",
    "Conv2dLoRA",
    "ConvBlock",
    "DepthwiseSeparableConv",
    "EmbeddingLoRA",
    "LinearLoRA",
    "PatchEmbedding",
    "PatchOutput",
    "ResBasicBlock",
    "auto_initialize",
    "pad_to_patch_size",
    "patchify",
    "reconstruct_from_patches",
    "split_to_patches",
    "unpatchify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orbit.adapter import layers

    return getattr(layers, name)


def __dir__() -> list[str]:
    return __all__

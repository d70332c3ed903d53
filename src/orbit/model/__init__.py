"""Building blocks, and what works on any `nn.Module`. And, as an index, document 000's adapted layers."""

from typing import TYPE_CHECKING, Any

from orbit.model.attention import (
    KVCache,
    MultiHeadAttention,
    RotaryPositionalEmbedding,
    Rotation,
    SinusoidalPositionalEmbedding,
    rotate,
)
from orbit.model.conv import TCN, CausalConv1d, ConvBlock, DepthwiseSeparableConv, ResBasicBlock
from orbit.model.count import count_params
from orbit.model.decoder import Transformer, TransformerConfig, TransformerOutput, load_llama_weights
from orbit.model.errors import (
    CacheError,
    MaskError,
    SettingError,
    ShapeError,
    TargetError,
    WeightsError,
)
from orbit.model.film import FiLM
from orbit.model.freeze import freeze_layers, get_trainable_params, unfreeze_layers
from orbit.model.gate import (
    ContextGate,
    GLUGate,
    Routing,
    SigmoidGate,
    SoftmaxGate,
    TanhGate,
    TopKGate,
    load_balancing_loss,
    router_z_loss,
)
from orbit.model.init import auto_initialize
from orbit.model.layer_io import get_model_by_name, load_layer, save_layer
from orbit.model.mask import (
    make_causal_mask,
    make_lookahead_mask,
    make_padding_mask,
    make_sliding_window_mask,
    positions_from_mask,
)
from orbit.model.mlp import MLP
from orbit.model.moe import MoE, moe_aux_loss, set_moe_training_mode
from orbit.model.patches import (
    PatchEmbedding,
    PatchOutput,
    pad_to_patch_size,
    patchify,
    reconstruct_from_patches,
    split_to_patches,
    unpatchify,
)
from orbit.model.registry import MODEL_REGISTRY, build_model, list_models, register_model

if TYPE_CHECKING:
    from orbit.adapter.layers import Conv1dLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA

__all__ = [
    "MLP",
    "MODEL_REGISTRY",
    "TCN",
    "CacheError",
    "CausalConv1d",
    "ContextGate",
    "Conv1dLoRA",
    "Conv2dLoRA",
    "ConvBlock",
    "DepthwiseSeparableConv",
    "EmbeddingLoRA",
    "FiLM",
    "GLUGate",
    "KVCache",
    "LinearLoRA",
    "MaskError",
    "MoE",
    "MultiHeadAttention",
    "PatchEmbedding",
    "PatchOutput",
    "ResBasicBlock",
    "RotaryPositionalEmbedding",
    "Rotation",
    "Routing",
    "SettingError",
    "ShapeError",
    "SigmoidGate",
    "SinusoidalPositionalEmbedding",
    "SoftmaxGate",
    "TanhGate",
    "TargetError",
    "TopKGate",
    "Transformer",
    "TransformerConfig",
    "TransformerOutput",
    "WeightsError",
    "auto_initialize",
    "build_model",
    "count_params",
    "freeze_layers",
    "get_model_by_name",
    "get_trainable_params",
    "list_models",
    "load_balancing_loss",
    "load_layer",
    "load_llama_weights",
    "make_causal_mask",
    "make_lookahead_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "moe_aux_loss",
    "pad_to_patch_size",
    "patchify",
    "positions_from_mask",
    "reconstruct_from_patches",
    "register_model",
    "rotate",
    "router_z_loss",
    "save_layer",
    "set_moe_training_mode",
    "split_to_patches",
    "unfreeze_layers",
    "unpatchify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from orbit.adapter import layers

    return getattr(layers, name)


def __dir__() -> list[str]:
    return __all__

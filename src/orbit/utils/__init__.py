"""The helpers of document 000 under their documented path. An index: nothing is defined here."""

from orbit.adapter import (
    LoRADiagnoser,
    freeze_backbone_only,
    inject_lora,
    inject_lora_file,
    load_lora,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from orbit.core.cuda_alloc import cuda_alloc
from orbit.core.rng import seed_everything, seed_worker
from orbit.data import build_sft, train_sft
from orbit.model.count import count_params
from orbit.model.freeze import freeze_layers, get_trainable_params, unfreeze_layers
from orbit.model.init import auto_initialize
from orbit.model.layer_io import get_model_by_name, load_layer, save_layer
from orbit.model.mask import (
    make_causal_mask,
    make_lookahead_mask,
    make_padding_mask,
    make_sliding_window_mask,
)
from orbit.model.patches import (
    pad_to_patch_size,
    patchify,
    reconstruct_from_patches,
    split_to_patches,
    unpatchify,
)

__all__ = [
    "LoRADiagnoser",
    "auto_initialize",
    "build_sft",
    "count_params",
    "cuda_alloc",
    "freeze_backbone_only",
    "freeze_layers",
    "get_model_by_name",
    "get_trainable_params",
    "inject_lora",
    "inject_lora_file",
    "load_layer",
    "load_lora",
    "make_causal_mask",
    "make_lookahead_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "merge_lora",
    "pad_to_patch_size",
    "patchify",
    "reconstruct_from_patches",
    "save_layer",
    "save_lora",
    "seed_everything",
    "seed_worker",
    "split_to_patches",
    "train_sft",
    "unfreeze_layers",
    "unmerge_lora",
    "unpatchify",
]

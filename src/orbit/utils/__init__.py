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
from orbit.core.rng import seed_everything
from orbit.data import build_sft, train_sft
from orbit.model.init import auto_initialize
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
    "freeze_backbone_only",
    "inject_lora",
    "inject_lora_file",
    "load_lora",
    "make_causal_mask",
    "make_lookahead_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "merge_lora",
    "pad_to_patch_size",
    "patchify",
    "reconstruct_from_patches",
    "save_lora",
    "seed_everything",
    "split_to_patches",
    "train_sft",
    "unmerge_lora",
    "unpatchify",
]

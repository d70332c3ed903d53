"""Data for language models: chat templates, SFT samples, batches, the step that trains on them. `images` has others."""

from orbit.data.collate import SFTCollator
from orbit.data.sft import MaskedSampleError, build_sft
from orbit.data.template import FALLBACK, TemplateError, encode, encode_turns, render
from orbit.data.train_sft import train_sft

__all__ = [
    "FALLBACK",
    "MaskedSampleError",
    "SFTCollator",
    "TemplateError",
    "build_sft",
    "encode",
    "encode_turns",
    "render",
    "train_sft",
]

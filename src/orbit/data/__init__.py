"""Data for language models: chat templates, SFT samples, batches, the step that trains on them. `images` has others."""

from orbit.data.batching import LengthGrouped
from orbit.data.collate import PaddingFreeCollator, SFTCollator
from orbit.data.packing import Packed, PackingError, check_packable
from orbit.data.sft import MaskedSampleError, build_sft
from orbit.data.sources import DataError, read_rows, stream_rows
from orbit.data.streams import StreamDataset
from orbit.data.template import FALLBACK, TemplateError, encode, encode_turns, render
from orbit.data.train_sft import train_sft

__all__ = [
    "FALLBACK",
    "DataError",
    "LengthGrouped",
    "MaskedSampleError",
    "Packed",
    "PackingError",
    "PaddingFreeCollator",
    "SFTCollator",
    "StreamDataset",
    "TemplateError",
    "build_sft",
    "check_packable",
    "encode",
    "encode_turns",
    "read_rows",
    "render",
    "stream_rows",
    "train_sft",
]

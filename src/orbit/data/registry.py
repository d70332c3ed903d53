"""Datasets, collators and sources of rows by name, and document 002's way to add to them."""

from __future__ import annotations

from typing import Any

from orbit.core.components import Components

DATASET_REGISTRY = Components("dataset", {"QADataset": "orbit.data.qa:QADataset"})
COLLATOR_REGISTRY = Components(
    "collator",
    {
        "DataCollatorForSupervisedDataset": "orbit.data.collate:SFTCollator",  # its name in open-unlearning
        "PaddingFreeCollator": "orbit.data.collate:PaddingFreeCollator",
        "PreferenceCollator": "orbit.data.collate:PreferenceCollator",
        "SFTCollator": "orbit.data.collate:SFTCollator",
    },
)
SOURCE_REGISTRY = Components("source", {"facts": "orbit.demo.facts:questions_and_answers"})


def _register_data(name: str, handler: Any) -> None:
    """Register a dataset class as `name` (document 002)."""
    DATASET_REGISTRY.add(name, handler)


def _register_collator(name: str, handler: Any) -> None:
    """Register a collator as `name`."""
    COLLATOR_REGISTRY.add(name, handler)

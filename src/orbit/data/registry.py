"""Datasets and collators by name, and document 002's way to add to them."""

from __future__ import annotations

from typing import Any

from orbit.core.components import Components

DATASET_REGISTRY = Components("dataset", {"QADataset": "orbit.data.qa:QADataset"})
COLLATOR_REGISTRY = Components("collator", {"SFTCollator": "orbit.data.collate:SFTCollator"})


def _register_data(name: str, handler: Any) -> None:
    """Register a dataset class as `name`, Orbit's own names too (document 002)."""
    DATASET_REGISTRY.add(name, handler, replace=True)


def _register_collator(name: str, handler: Any) -> None:
    """Register a collator as `name`, Orbit's own names too."""
    COLLATOR_REGISTRY.add(name, handler, replace=True)

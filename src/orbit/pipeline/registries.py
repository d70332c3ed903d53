"""Trainers by name, and one place from which every kind of component is registered.

A trainer is what computes the loss: an objective (our driver, or transformers' loop around it), or a subclass of
`transformers.Trainer`, which brings a loop of its own.
"""

from __future__ import annotations

from typing import Any

from orbit.core.components import Components
from orbit.data.registry import COLLATOR_REGISTRY, DATASET_REGISTRY, SOURCE_REGISTRY

TRAINER_REGISTRY = Components("trainer", {"finetune": "orbit.objective.causal_lm:CausalLM"})


def _register_trainer(name: str, handler: Any) -> None:
    """Register an objective or a subclass of `transformers.Trainer` as `name` (document 002)."""
    TRAINER_REGISTRY.add(name, handler)


class register:
    """Decorators: `@register.dataset("NAME")`, `@register.trainer("NAME")`, ..."""

    dataset = DATASET_REGISTRY.register
    collator = COLLATOR_REGISTRY.register
    source = SOURCE_REGISTRY.register
    trainer = TRAINER_REGISTRY.register


REGISTRIES: dict[str, Components] = {
    "datasets": DATASET_REGISTRY,
    "collators": COLLATOR_REGISTRY,
    "sources": SOURCE_REGISTRY,
    "trainers": TRAINER_REGISTRY,
}

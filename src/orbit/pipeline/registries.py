"""Every kind of component by name, and one place from which each is registered.

    @register.dataset("MyData")         a class whose arguments are `data.train.<name>.args`
    @register.objective("MyLoss")       what computes the loss, under our driver or transformers'
    @register.trainer("MyTrainer")      a subclass of `transformers.Trainer`, which brings a loop of its own

`trainer.handler` of a config names a trainer or an objective. `orbit list` shows all of it, and entry points of
installed packages (`orbit.dataset`, `orbit.objective`, ...) add to it.
"""

from __future__ import annotations

from typing import Any

from orbit.core.components import ComponentError, Components
from orbit.core.names import did_you_mean
from orbit.data.registry import COLLATOR_REGISTRY, DATASET_REGISTRY, SOURCE_REGISTRY
from orbit.evaluate.registry import METRIC_REGISTRY, SUITE_REGISTRY
from orbit.model.registry import MODEL_REGISTRY
from orbit.objective.registry import OBJECTIVE_REGISTRY

TRAINER_REGISTRY = Components("trainer", {"finetune": "orbit.objective.causal_lm:CausalLM"})


def _register_trainer(name: str, handler: Any) -> None:
    """Register an objective or a subclass of `transformers.Trainer` as `name`, Orbit's own names too (document 002)."""
    TRAINER_REGISTRY.add(name, handler, replace=True)


def find_trainer(name: str) -> Any:
    """The trainer or objective that `trainer.handler` names.

    Raises:
        ComponentError: there is neither.
    """
    for registry in (TRAINER_REGISTRY, OBJECTIVE_REGISTRY):
        if name in registry:
            return registry[name]
    known = sorted({*TRAINER_REGISTRY, *OBJECTIVE_REGISTRY})
    raise ComponentError(
        f"trainer {name!r} is neither a registered trainer nor an objective; registered: {known}"
        f"{did_you_mean(name, known)}"
    )


class register:
    """Decorators: `@register.dataset("NAME")`, `@register.objective("NAME")`, ..."""

    model = MODEL_REGISTRY.register
    dataset = DATASET_REGISTRY.register
    collator = COLLATOR_REGISTRY.register
    objective = OBJECTIVE_REGISTRY.register
    source = SOURCE_REGISTRY.register
    trainer = TRAINER_REGISTRY.register
    metric = METRIC_REGISTRY.register
    suite = SUITE_REGISTRY.register


REGISTRIES: dict[str, Components] = {
    "models": MODEL_REGISTRY,
    "datasets": DATASET_REGISTRY,
    "collators": COLLATOR_REGISTRY,
    "objectives": OBJECTIVE_REGISTRY,
    "sources": SOURCE_REGISTRY,
    "trainers": TRAINER_REGISTRY,
    "metrics": METRIC_REGISTRY,
    "suites": SUITE_REGISTRY,
}

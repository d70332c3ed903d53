"""The parts of a run, from its config: model and tokenizer, adapter, collator, objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from orbit.adapter import AdapterConfig, InjectReport, inject
from orbit.config import ConfigError
from orbit.core.extras import need
from orbit.core.making import make
from orbit.core.names import did_you_mean
from orbit.data.registry import COLLATOR_REGISTRY
from orbit.pipeline.registries import find_trainer
from orbit.pipeline.schema import named


def load_tokenizer(cfg: Mapping[str, Any]) -> Any:
    """The tokenizer of the section `model`."""
    need("llm", "transformers", "jinja2")
    from transformers import AutoTokenizer

    from orbit.demo.smollm2 import resolve_model

    given = dict(cfg.get("tokenizer_args") or {})
    path = (
        given.pop("pretrained_model_name_or_path", None) or cfg["model_args"]["pretrained_model_name_or_path"]
    )
    return AutoTokenizer.from_pretrained(resolve_model(path), **given)


def load_model(cfg: Mapping[str, Any]) -> nn.Module:
    """The model of the section `model`."""
    need("llm", "transformers")
    from transformers import AutoModelForCausalLM

    from orbit.demo.smollm2 import resolve_model

    given = dict(cfg["model_args"])
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(given.pop("pretrained_model_name_or_path")), **given
    )


def adapt(model: nn.Module, cfg: Mapping[str, Any], task: str) -> InjectReport:
    """Adapt the model as the section `adapter` says."""
    settings = dict(cfg)
    kind = settings.pop("type", "lora")
    known = [field.name for field in fields(AdapterConfig)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"adapter has no setting {key!r}{did_you_mean(key, known)}; it has: {', '.join(known)}"
            )
    if kind not in ("lora", "dora"):
        raise ConfigError(f"adapter.type {kind!r} is unknown{did_you_mean(kind, ('lora', 'dora'))}")
    if kind == "dora":
        settings["dora"] = True
    return inject(model, AdapterConfig(**settings), task)


def build_collator(section: Mapping[str, Any], tokenizer: Any) -> Any:
    """The section `collator`."""
    handler, args = named(section, "collator")
    return make(COLLATOR_REGISTRY[handler], args, f"collator {handler!r}", tokenizer=tokenizer)


def trainer_of(section: Mapping[str, Any]) -> Any:
    """What the section `trainer` names: the class of an objective, or a subclass of `transformers.Trainer`."""
    handler, _ = named(section, "trainer")
    return find_trainer(handler)


def build_objective(section: Mapping[str, Any]) -> Any:
    """The objective of the section `trainer`."""
    handler, _ = named(section, "trainer")
    return make(trainer_of(section), dict(section.get("method_args") or {}), f"trainer {handler!r}")

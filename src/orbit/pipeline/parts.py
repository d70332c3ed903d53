"""The parts of a run, from its config: model and tokenizer, adapter, datasets, collator, objective."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from orbit.adapter import AdapterConfig, inject
from orbit.config import ConfigError
from orbit.core.extras import need
from orbit.core.names import did_you_mean
from orbit.data.registry import COLLATOR_REGISTRY, DATASET_REGISTRY
from orbit.pipeline.registries import TRAINER_REGISTRY
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


def adapt(model: nn.Module, cfg: Mapping[str, Any] | None, task: str) -> None:
    """Adapt the model as the section `adapter` says; null trains all of it."""
    if cfg is None:
        return
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
    inject(model, AdapterConfig(**settings), task)


def build_dataset(
    name: str, section: Mapping[str, Any], tokenizer: Any, template_args: Mapping[str, Any]
) -> Any:
    """One dataset of `data.train` or `data.eval`: its handler (or what is registered as its name) with its args."""
    handler = section.get("handler") or name
    args = dict(section.get("args") or {})
    return call(
        DATASET_REGISTRY[handler], args, f"data {name!r}", template_args=template_args, tokenizer=tokenizer
    )


def build_collator(section: Mapping[str, Any], tokenizer: Any) -> Any:
    """The section `collator`."""
    handler, args = named(section, "collator")
    return call(COLLATOR_REGISTRY[handler], args, f"collator {handler!r}", tokenizer=tokenizer)


def trainer_of(section: Mapping[str, Any]) -> Any:
    """What the section `trainer` names: the class of an objective, or a subclass of `transformers.Trainer`."""
    handler, _ = named(section, "trainer")
    return TRAINER_REGISTRY[handler]


def build_objective(section: Mapping[str, Any]) -> Any:
    """The objective of the section `trainer`."""
    handler, _ = named(section, "trainer")
    return call(trainer_of(section), dict(section.get("method_args") or {}), f"trainer {handler!r}")


def call(component: Any, args: Mapping[str, Any], where: str, **given: Any) -> Any:
    """Make a component, arguments of the config checked against its signature first.

    Raises:
        ConfigError: an argument that it does not take, or one that it lacks.
    """
    parameters = inspect.signature(component).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in args:
        if key in given or (key not in parameters and not takes_any):
            free = [name for name in parameters if name not in given]
            raise ConfigError(
                f"{where} takes no argument {key!r}{did_you_mean(key, free)}; it takes: {', '.join(free)}"
            )
    passed = {key: value for key, value in given.items() if takes_any or key in parameters}
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and name not in {*args, *passed}
    ]
    if missing:
        raise ConfigError(f"{where} needs {', '.join(missing)}: write that into its args")
    return component(**args, **passed)

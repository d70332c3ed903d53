"""Document 000's functions, over the adapter core.

They differ from it in taste only: `inject_lora` takes loose arguments and returns the model, where `inject`
takes an AdapterConfig and returns a report; both do the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import ConfigError, TargetError, TaskError
from orbit.adapter.files import load, save
from orbit.adapter.inject import adapter_parameters, freeze, inject, one_task, set_trainable, tasks
from orbit.adapter.merge import merge, unmerge
from orbit.core.names import did_you_mean, nearest

Names = str | Sequence[str] | None


def inject_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    dora: bool = False,
    target_names: Names = None,
    exclude_names: Names = None,
    *,
    alpha: float | None = None,
    rslora: bool = False,
    gated: bool = False,
    name: str = "default",
    verbose: bool = False,
    **settings: Any,
) -> nn.Module:
    """Inject a LoRA or DoRA task into `model`, freeze the rest, and return the model.

    Args:
        model: any module.
        r: rank.
        lora_alpha, alpha: two names of the same number, 16 by default; the scale is alpha/r.
        lora_dropout: dropout before the branch.
        dora: DoRA instead of LoRA.
        target_names: layers or containers (see `AdapterConfig.targets`); None: every linear layer but the
            head.
        exclude_names: layers to leave out.
        rslora: scale alpha/√r.
        gated: learn one factor of the update in every layer.
        name: the task's name.
        verbose: print what was adapted.
        **settings: the other fields of `AdapterConfig`: init, bias, tokens, layers, save_modules, parameters,
            rank_pattern, alpha_pattern.

    Raises:
        TargetError, TaskError, ConfigError, GraftError: the model is unchanged. TypeError: an unknown setting.
    """
    config = AdapterConfig(
        r=r,
        alpha=one_alpha(alpha, lora_alpha, default=16.0),
        dropout=lora_dropout,
        dora=dora,
        rslora=rslora,
        gated=gated,
        targets=None if target_names is None else as_names(target_names),
        exclude=as_names(exclude_names),
        **more_settings("inject_lora", settings, {"dropout": "lora_dropout"}),
    )
    report = inject(model, config, name)
    if verbose:
        print(report)
    return model


def merge_lora(model: nn.Module, name: str | None = None, *, untie: bool = False) -> nn.Module:
    """Fold a task (None: the current one) into the weights; see `merge`. Returns the model."""
    merge(model, name, untie=untie)
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit; see `unmerge`. Returns the model."""
    unmerge(model)
    return model


def save_lora(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Write a task to a PEFT folder, or to one file if `path` ends in `.safetensors`.

    Args:
        name: the task; None means the model's only one, else the current one.

    A head that `freeze_backbone_only` has unlocked belongs to the model and not to the task; see `AdapterConfig`'s
    `save_modules` for one that does.

    Raises:
        TaskError: no such task, or several and none current.
    """
    return save(model, path, one_task(model, name))


def load_lora(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> nn.Module:
    """Load a saved task into the model's task `name` (None: its only or current one). Returns the model.

    A model without tasks gets one, frozen. Raises AdapterFileError: see `load`.
    """
    load(model, path, "default" if name is None and not tasks(model) else one_task(model, name))
    return model


def inject_lora_file(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> nn.Module:
    """Inject the task that `path` describes, with its weights, ready to be trained on. Returns the model.

    Raises:
        TaskError: the model has a task of this name. AdapterFileError: see `load`.
    """
    if name in tasks(model):
        raise TaskError(f"there is a task {name!r} already; load_lora fills it, or inject under another name")
    load(model, path, name, trainable=True)
    return model


def freeze_backbone_only(model: nn.Module, unlock_head_keywords: Names = None) -> nn.Module:
    """Train the adapters and the named heads, and nothing else. Returns the model.

    Args:
        unlock_head_keywords: modules or parameters to train whole, by dotted segments of their names: "head"
            means `head`, `model.head.bias` and `head.0.weight`, and not `overhead`.

    Raises:
        TargetError: a keyword that names nothing. The model is unchanged.
    """
    heads = named_parameters_of(model, as_names(unlock_head_keywords))
    freeze(model)
    for task in tasks(model):
        set_trainable(model, task)
    for parameter in heads:
        parameter.requires_grad_(True)
    return model


def named_parameters_of(model: nn.Module, keywords: Sequence[str]) -> list[nn.Parameter]:
    """The base model's parameters that have a keyword among the dotted segments of their names.

    Raises:
        TargetError: a keyword that names nothing.
    """
    adapters = {id(parameter) for parameter in adapter_parameters(model).values()}
    base = {name: p for name, p in model.named_parameters() if id(p) not in adapters}
    found = []
    for keyword in keywords:
        hits = [p for name, p in base.items() if f".{keyword}." in f".{name}."]
        if not hits:
            segments = {part for name in base for part in name.split(".")[:-1] if not part.isdigit()}
            hint = did_you_mean(keyword, segments) or f"; the names are made of {sorted(segments)[:12]}"
            raise TargetError(f"unlock_head_keywords: {keyword!r} names none of {len(base)} parameters{hint}")
        found += hits
    return found


def one_alpha(alpha: float | None, lora_alpha: float | None, *, default: float) -> float:
    """The value given under either name.

    Raises:
        ConfigError: both are given and differ.
    """
    if alpha is not None and lora_alpha is not None and alpha != lora_alpha:
        raise ConfigError(f"alpha={alpha} and lora_alpha={lora_alpha} are one setting; give it once")
    given = lora_alpha if alpha is None else alpha
    return default if given is None else given


def more_settings(
    face: str, given: Mapping[str, Any], own: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Settings of AdapterConfig that a face takes beside its own arguments.

    Args:
        face: what it is called in errors.
        own: fields that it has as an argument of another name, with that name.

    Raises:
        TypeError: an unknown setting.
    """
    other = {"targets": "target_names", "exclude": "exclude_names", **(own or {})}
    known = [field.name for field in fields(AdapterConfig)]
    for name in given:
        close = other.get(name) or nearest(name, [other.get(field, field) for field in known])
        if name in other or name not in known:
            raise TypeError(f"{face} has no setting {name!r}{f'; did you mean {close!r}?' if close else ''}")
    return dict(given)


def as_names(names: Names) -> tuple[str, ...]:
    """A name, a list of names or None as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)

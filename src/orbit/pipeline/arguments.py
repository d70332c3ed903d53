"""`trainer.args`: the vocabulary of `transformers.TrainingArguments`, as our driver understands it.

A field that our driver cannot honour is an error, except those that document 002's own yaml prints, which have a
written substitute and warn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from orbit.config import ConfigError
from orbit.core.names import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What our driver takes of `transformers.TrainingArguments`, with its defaults unless said."""

    output_dir: str | None = None
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 3.0
    max_steps: int = -1
    logging_steps: int = 10
    optim: str = "adamw_torch"
    bf16: bool = False
    fp16: bool = False
    seed: int = 42


def read_arguments(given: Mapping[str, Any], strict: bool = False) -> Arguments:
    """The arguments of a config.

    Raises:
        ConfigError: an argument that our driver does not have.
    """
    known = {field.name for field in fields(Arguments)}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"trainer.args has {name!r}, which driver orbit does not take{did_you_mean(name, known)}; driver=hf "
                "takes whatever transformers.TrainingArguments takes"
            )
    return Arguments(**given)


def substituted(strict: bool, what: str) -> None:
    """Say that something else is done than was asked; under `strict` an error."""
    if strict:
        raise ConfigError(f"{what} (strict=true)")
    warnings.warn(what, stacklevel=2)

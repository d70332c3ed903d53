"""The LoRA plugin: inject when the model is built, freeze the rest, and see that every adapter learns.

The work is done by `orbit.adapter`; this only decides when.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import ConfigError
from orbit.adapter.files import is_sharded, save
from orbit.adapter.functions import Names, as_names, more_settings, named_parameters_of, one_alpha
from orbit.adapter.inject import (
    InjectReport,
    adapter_parameters,
    check_gradients,
    freeze,
    inject,
    set_trainable,
    task_config,
    tasks,
)
from orbit.adapter.reach import same_task
from orbit.adapter.routes.route import current_route
from orbit.core.events import Plugin
from orbit.core.runtime import is_main_process

_logger = logging.getLogger(__name__)


class LoRA(Plugin):
    """Train `trainer.model` through a low-rank adapter.

    Args:
        target_names: layers or containers (see `AdapterConfig.targets`); None: every linear layer but the
            head.
        r: rank.
        alpha, lora_alpha: two names of the same number, 32 by default; the scale is alpha/r.
        dropout, lora_dropout: two names of the branch's dropout, 0 by default.
        dora: DoRA instead of LoRA.
        rslora: scale alpha/√r.
        gated: learn one factor of the update in every layer.
        exclude_names: layers to leave out.
        unlock_head_keywords: modules to train whole beside the adapter (see `freeze_backbone_only`). They are in the
            run's checkpoints and not in the adapter's file; a task that holds its head is injected before, with
            `AdapterConfig(save_modules=...)`.
        name: the task's name.
        path: a folder (or a `.safetensors` file) to which the adapter is written, in PEFT's format, at every
            epoch's end and when training ends; a relative one lies in the trainer's workspace, if it has one.
            None writes nothing: the adapter is in the run's checkpoints in any case.
        **settings: the other fields of `AdapterConfig`: init, bias, tokens, layers, save_modules, parameters,
            rank_pattern, alpha_pattern.

    Raises:
        ConfigError: two names of one setting disagree, or a value is out of range. When training starts:
            TargetError, and ConfigError if the model already has another task of this name. TypeError: an unknown
            setting.

    After the start, `report` says what was adapted.

    >>> plugin = LoRA(target_names=["mlp"], dora=True, r=16, alpha=32)
    >>> plugin.config.targets
    ('mlp',)
    """

    priority = Plugin.TRANSFORM

    def __init__(
        self,
        target_names: Names = None,
        r: int = 16,
        alpha: float | None = None,
        dropout: float | None = None,
        dora: bool = False,
        rslora: bool = False,
        exclude_names: Names = None,
        unlock_head_keywords: Names = None,
        name: str = "default",
        path: str | os.PathLike[str] | None = None,
        *,
        gated: bool = False,
        lora_alpha: float | None = None,
        lora_dropout: float | None = None,
        **settings: Any,
    ) -> None:
        if dropout is not None and lora_dropout is not None and dropout != lora_dropout:
            raise ConfigError(
                f"dropout={dropout} and lora_dropout={lora_dropout} are one setting; give it once"
            )
        given = lora_dropout if dropout is None else dropout
        self.config = AdapterConfig(
            r=r,
            alpha=one_alpha(alpha, lora_alpha, default=32.0),
            dropout=0.0 if given is None else given,
            dora=dora,
            rslora=rslora,
            gated=gated,
            targets=None if target_names is None else as_names(target_names),
            exclude=as_names(exclude_names),
            **more_settings("LoRA", settings),
        )
        self.unlock_head_keywords = as_names(unlock_head_keywords)
        self.name = name
        self.path = None if path is None else Path(path)
        self.report: InjectReport | None = None
        self._learns: bool | None = None  # has the task had a gradient in this run? Not asked before a step

    def on_build_model(self, trainer: Any) -> None:
        """Inject the task, unless the model has it already (a second `train()`, a model loaded with it)."""
        model = _model(trainer)
        heads = named_parameters_of(model, self.unlock_head_keywords)
        if self.name not in tasks(model):
            self.report = inject(model, self.config, self.name)
            refused = any(why != "the head" for why in self.report.skipped.values())
            _logger.log(logging.WARNING if refused else logging.INFO, "LoRA %s", self.report)
            left = [name for name, why in self.report.skipped.items() if why == "the head"]
            if left and not heads and not self.config.save_modules and _judges(model):
                _logger.warning(
                    "LoRA: the head %s stays frozen; if it is new, it must train: unlock_head_keywords=[%r]",
                    ", ".join(left),
                    left[0].split(".")[0],
                )
        else:
            self._check_same(model)
            freeze(model)
            set_trainable(model, self.name)
        for parameter in heads:
            parameter.requires_grad_(True)

    def _check_same(self, model: nn.Module) -> None:
        own, have = self.config, task_config(model, self.name)
        if not same_task(model, own, have):
            raise ConfigError(
                f"the model has a task {self.name!r} with {have}, and this plugin asks for {own}; "
                "give the plugin another name=, or remove the task first"
            )

    def on_before_optimizer_step(self, trainer: Any) -> None:
        """An adapter that was used and got no gradient would silently never train: say so."""
        model = _model(trainer)
        check_gradients(model, may_be_empty=True)
        if not self._learns:
            self._learns = any(p.grad is not None for p in adapter_parameters(model, self.name).values())

    def on_after_epoch(self, trainer: Any) -> None:
        """Write the adapter."""
        self._write(trainer)

    def on_after_train(self, trainer: Any) -> None:
        """Write the adapter as training left it, and say so if it was never used."""
        self._write(trainer)
        if self._learns is False:
            _logger.warning(
                "task %r got no gradient in this run: no call used it. The current route is %r; call "
                "model(..., task=%r) or set_route",
                self.name,
                current_route(_model(trainer)),
                self.name,
            )
        self._learns = None

    def _write(self, trainer: Any) -> None:
        if (
            self.path is None
            or trainer.options.fast_dev_run
            or not (is_main_process() or is_sharded(_model(trainer)))
        ):
            return
        save(_model(trainer), trainer.in_workspace(self.path), self.name)


def _model(trainer: Any) -> nn.Module:
    model = getattr(trainer, "unwrapped_model", None)
    return trainer.model if model is None else model


def _judges(model: nn.Module) -> bool:
    """A model of transformers whose head is no output embedding: a classifier's, which is new in most runs."""
    output = getattr(model, "get_output_embeddings", None)
    return callable(output) and output() is None

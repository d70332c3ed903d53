"""Making a model a mixture: its experts are read from folders, and a classifier is put beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from orbit.adapter.files import load
from orbit.adapter.inject import remove, tasks
from orbit.adapter.routes.route import current_route, set_route
from orbit.core.rng import preserved
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.errors import XLoRAError
from orbit.xlora.model import mix, xLoRAModel


def add_xlora_to_model(
    model: nn.Module,
    xlora_config: xLoRAConfig,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    verbose: bool = False,
) -> xLoRAModel:
    """Make a causal language model of transformers a mixture of LoRA experts, in place.

    Args:
        model: the base model. Tasks that it has stay beside the experts.
        adapters: name → folder of a PEFT adapter (`adapter.save`, or PEFT's own), the experts in this order; None
            takes `xlora_config.adapters`. Names are free.
        verbose: print what was made.

    Returns:
        The same model, now a `xLoRAModel` too: everything is frozen but the classifier and, if
        `use_trainable_adapters`, the experts.

    Raises:
        XLoRAError: no experts, a name that the model has, another hidden size.
        AdapterFileError: a folder does not belong to this model. The model is unchanged.
    """
    folders = adapters if adapters is not None else xlora_config.adapters
    if not folders:
        raise XLoRAError("a mixture needs at least one expert: adapters={name: folder of a PEFT adapter}")
    taken = [name for name in folders if name in tasks(model)]
    if taken:
        raise XLoRAError(
            f"the model has a task {taken[0]!r} already; remove it, or give the expert another name"
        )
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = current_route(model) if tasks(model) else None
    done: list[str] = []
    try:
        with preserved():
            for name, folder in folders.items():
                load(model, folder, name)
                done.append(name)
        mixture = mix(model, tuple(folders), replace(xlora_config, adapters=dict(folders)))
    except BaseException:
        for name in done:
            remove(model, name)
        if tasks(model):
            set_route(model, before)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise
    if verbose:
        print(f"{type(model).__name__}: {len(folders)} experts on {len(mixture.xlora_layers())} layers")
        mixture.print_trainable_parameters()
    return mixture

"""Making a model a mixture: its experts are read from folders, and a classifier is put beside them.

`add_xlora_to_model` makes a new classifier, `from_pretrained` reads a trained one. Either leaves the model as it was
if anything goes wrong.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orbit.adapter.files import load
from orbit.adapter.files import read as read_adapter
from orbit.adapter.inject import remove, tasks
from orbit.adapter.routes.route import current_route, set_route
from orbit.core.rng import capture, preserved, restore
from orbit.xlora import files
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.errors import XLoRAError
from orbit.xlora.experts import expert_layers
from orbit.xlora.mixing import mix, new_classifier
from orbit.xlora.model import xLoRAModel
from orbit.xlora.passes.decoder import hidden_size


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
        XLoRAError: no xLoRAConfig, no experts, a name that the model has, another hidden size.
        AdapterFileError: a folder does not belong to this model. The model is unchanged.
    """
    if not isinstance(xlora_config, xLoRAConfig):
        raise XLoRAError(f"xlora_config={xlora_config!r} must be an xLoRAConfig(hidden_size=…)")
    folders = adapters if adapters is not None else xlora_config.adapters
    if folders is not None and not isinstance(folders, Mapping):
        raise XLoRAError(f"adapters={folders!r} must be {{name: folder of a PEFT adapter}}")
    with _undone_on_error(model):
        mixture = _with_experts(model, folders or {})
        mix(model, tuple(mixture), replace(xlora_config, adapters=mixture))
    return _made(model, verbose)


def from_pretrained(
    load_directory: str | os.PathLike[str],
    model: nn.Module,
    adapters: Mapping[str, str | os.PathLike[str]] | Sequence[str] | None = None,
    verbose: bool | str | torch.device = False,
    device: str | torch.device | bool | None = None,
    from_safetensors: bool = True,
) -> xLoRAModel:
    """Make `model`, in place, the mixture that was saved in a folder, here, by the public implementation or by PEFT.

    Args:
        load_directory: the folder with the classifier.
        model: the base model that the mixture was trained on.
        adapters: name → folder of every expert; or the names of experts that were saved with the classifier; None
            is all of these. The order does not matter where the folder tells it.
        verbose: print what was made. A device in this place is taken for the next argument.
        device: of the classifier; None is the model's.
        from_safetensors: read `xlora_classifier.safetensors`, else `xlora_classifier.pt`.

    Returns:
        The same model, now a `xLoRAModel` too. What trains is as `add_xlora_to_model` has it.

    Raises:
        XLoRAError: the folder is incomplete, damaged, or of another model, other experts or layers.
        AdapterFileError: an expert does not belong to this model. The model is unchanged.
    """
    if isinstance(verbose, bool) == isinstance(device, bool) and (device is not None):
        raise XLoRAError(
            f'verbose={verbose!r}, device={device!r}: give True or False, and a device such as "cuda"'
        )
    says, place = (verbose, device) if isinstance(verbose, bool) else (bool(device), verbose)
    folder = Path(load_directory)
    saved = files.read(folder, from_safetensors)
    folders = saved.expert_folders(adapters)
    config = xLoRAConfig(**saved.settings, device=place, adapters=folders)  # type: ignore[arg-type]
    if saved.base is not None:
        files.check_base(folder, saved.base, model, hidden_size(model))
    with _undone_on_error(model), preserved():
        names = tuple(_with_experts(model, folders))
        if saved.base is not None:
            files.check_layers(folder, saved.base, expert_layers(model, names))
        classifier = new_classifier(model, names, config)
        files.fill(classifier, saved.tensors, saved.source)
        if isinstance(adapters, Mapping):
            _warn_of_others(saved, folders)
        mix(model, names, config, classifier)
    return _made(model, says)


def _with_experts(
    model: nn.Module, folders: Mapping[str, str | os.PathLike[str]]
) -> dict[str, str | os.PathLike[str]]:
    """Load the experts, and say which from where."""
    if isinstance(model, xLoRAModel):
        raise XLoRAError(f"{type(model).__name__} is a mixture of {list(model.xlora_experts)} already")
    if not folders:
        raise XLoRAError("a mixture needs at least one expert: adapters={name: folder of a PEFT adapter}")
    for name in folders:
        if name in tasks(model):
            raise XLoRAError(
                f"the model has a task {name!r} already; remove it, or give the expert another name"
            )
    with preserved():  # what injecting draws is overwritten
        for name, folder in folders.items():
            load(model, folder, name)
    return dict(folders)


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, the model has the tasks, the route and the trained parameters that it had, and so has the
    process its random numbers."""
    had = tasks(model)
    route = current_route(model) if had else None
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    drawn = capture()
    try:
        yield
    except BaseException:
        for name in tasks(model):
            if name not in had:
                remove(model, name)
        if had:
            set_route(model, route)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        restore(drawn)
        raise


def _warn_of_others(saved: files.Saved, folders: Mapping[str, Path]) -> None:
    """Say so if an expert is not the one that was saved beside the classifier."""
    for name, folder in folders.items():
        places = [place for place in (saved.experts or {}).get(name, ()) if place.is_dir()]
        if saved.base is None or not places or places[0].resolve() == folder.resolve():
            continue
        ours, theirs = read_adapter(places[0])[1], read_adapter(folder)[1]
        if any(
            key not in theirs or not torch.equal(t.float(), theirs[key].float()) for key, t in ours.items()
        ):
            warnings.warn(
                f"expert {name!r} of {folder} is not the one that this classifier was saved with, which is in "
                f"{places[0]}; pass adapters as a list of names to load that",
                stacklevel=4,
            )


def _made(model: Any, verbose: bool) -> xLoRAModel:
    assert isinstance(model, xLoRAModel)
    if verbose:
        print(
            f"{type(model).__name__}: {len(model.xlora_experts)} experts on {len(model.xlora_layers())} layers"
        )
        model.print_trainable_parameters()
    return model

"""Adapters on disk, in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

    base_model.model.<layer>.lora_A.weight              (r, in)
    base_model.model.<layer>.lora_B.weight              (out, r)
    base_model.model.<layer>.lora_magnitude_vector      (out,)     DoRA only
    base_model.model.<layer>.base_layer.bias            (out,)     of a task that has biases of its own
    base_model.model.<layer>.token_adapter.trainable_tokens_delta  (n, dim)  of one that has token rows

PEFT and vLLM load what is written here, and the reverse; `docs/formats.md` has the whole table. What PEFT has no
place for (a gate, the start of PiSSA) is written beside it under our own names, with `peft_type: ORBIT`, which PEFT
refuses instead of misreading; `save(..., peft=True)` writes it as PEFT can hold it, or says why it cannot. A path
that ends in `.safetensors` means one file, with the config in its metadata. Nothing but safetensors and JSON is
read: no pickle, and no module that a file names is imported.

Writing is atomic: a new folder appears complete or not at all; in an existing one each file is replaced whole.
Loading is strict: every key of the file must be one that the task has, and the reverse, or the model stays as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orbit.adapter.errors import AdapterFileError
from orbit.adapter.files.checks import (
    check_auto_mapping,
    check_coverage,
    check_same,
    has_ranks,
    plain_key,
    target_modules,
    without_copies,
)
from orbit.adapter.files.peft_config import from_peft, to_peft
from orbit.adapter.files.peft_keys import (
    key_of,
    named_in,
    places,
    rows_of,
    targets_of,
    without_followers,
)
from orbit.adapter.files.writing import CONFIG, WEIGHTS, write
from orbit.adapter.inject import (
    InjectReport,
    bare,
    inject,
    refuse_model,
    remove,
    set_trainable,
    task_config,
    tasks,
    unwrapped,
)
from orbit.adapter.kinds.registry import own_class
from orbit.adapter.merge import refuse_merged
from orbit.adapter.routes.route import find_state, install, state_of
from orbit.core.patterns import clean
from orbit.core.rng import preserved
from orbit.core.runtime import is_main_process
from orbit.core.safetensors_header import check_header

_LARGEST_CONFIG = 4 << 20  # bytes


def save(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, peft: bool = False
) -> Path:
    """Write a task to `path`: a folder in PEFT's format, or one file if it ends in `.safetensors`.

    Of a model that `fully_shard` has sharded every rank must call it, and the first one writes.

    Args:
        peft: write only what PEFT reads: a gate is folded into B, a start that was kept beside the base doubles
            the rank. Without it such tasks are written exactly, for `load`.

    Raises:
        TaskError: no such task. AdapterFileError: `peft=True` for a task that PEFT's format cannot hold. OSError:
        from the file system; then the former content is still there.
    """
    path = Path(path)
    text, tensors = contents(model, name, peft=peft)
    sharded = is_sharded(bare(model))
    if is_main_process() or not sharded:
        write(path, text, tensors)
    if sharded:
        dist.barrier()
    return path


def contents(model: nn.Module, name: str, *, peft: bool = False) -> tuple[str, dict[str, Tensor]]:
    """What `save` writes: the config's text, and the tensors on the CPU, each with a memory of its own.

    Of a model that `fully_shard` has sharded every rank must call it.

    Raises:
        TaskError, AdapterFileError: as `save`.
    """
    model = bare(model)
    config = task_config(model, name)
    layers = places(model, name)
    tensors: dict[str, Tensor] = {}
    for place, layer in layers.items():
        why = layer.not_for_peft(name)
        if peft and why is not None:
            raise AdapterFileError(f"task {name!r} cannot be written for PEFT: layer {place!r}: {why}")
        found = layer.peft_tensors(name) if peft else layer.file_tensors(name)
        tensors.update({key_of(place, end): tensor for end, tensor in found.items()})
    tensors = apart({key: whole(t).cpu().contiguous() for key, t in without_followers(tensors).items()})
    targets, parameters, copies = targets_of(model, name)
    fields = to_peft(
        config.as_plain() if peft else config,
        target_modules(model, targets),
        parameters,
        copies,
        rows_of(model, name),
        fan_in_fan_out=any(own_class(layer).__name__ == "Conv1D" for layer in layers.values()),
        own=not peft and any(layer.only_ours(name) for layer in layers.values()),
    )
    fields["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    fields["task_type"] = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    text = json.dumps(fields, indent=2, sort_keys=True)
    return text, tensors


def load(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> InjectReport | None:
    """Read a task from `path` into the model, injecting it if the model has no task of this name.

    Args:
        model: the base model that the adapter was trained on, with or without other tasks.
        path: a folder in PEFT's format or a `.safetensors` file written by `save`.
        name: what to call the task; what it was called when saved does not matter. It becomes current.
        trainable: whether an injected task trains. An existing one keeps its state. The base model is frozen, unless
            this task is not to train and the model has others, beside which a head may be training.

    Returns:
        The report of the injection, or None if the task was there.

    Raises:
        AdapterFileError: naming the key or field that is missing, unexpected, of the wrong shape or not
            finite.
        ConfigError: a field of PEFT's config cannot be honoured. GraftError: a new task for a model that is wrapped
            by DistributedDataParallel or sharded. MergeError: the task is merged. The model is unchanged.
    """
    whole, model = unwrapped(model), bare(model)
    if name not in tasks(model):
        refuse_model(whole)
    fields, tensors = read(path)
    check_auto_mapping(path, fields, model)
    tensors = without_copies(fields, tensors, {clean(raw): module for raw, module in model.named_modules()})
    if not tensors:
        raise AdapterFileError(f"{path} holds no tensors")
    named = named_in(path, fields, tensors, model)
    config = from_peft(fields, *named)
    check_coverage(path, fields, named, model)
    if name in tasks(model):
        refuse_merged(model, name)
        check_same(path, model, name, config)
        _fill(path, model, name, tensors)
        return None
    with _undone_on_error(model, name), preserved():  # what `inject` draws at random is overwritten at once
        # A task that only runs leaves alone what trains beside others: an unlocked head, say.
        freeze = trainable or len(tasks(model)) == 0
        report = inject(model, config, name, freeze_base=freeze, any_rank=has_ranks(config, tensors))
        if not trainable:
            set_trainable(model, name, False)
            report = replace(report, trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))
        _fill(path, model, name, tensors)
    install(whole, state_of(model))
    return report


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config fields and tensors at `path`, checked to be finite.

    Raises:
        AdapterFileError: a file is absent, unreadable, or holds a value that is not finite.
    """
    path = Path(path)
    weights = path if path.suffix == ".safetensors" else path / WEIGHTS
    if not weights.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, convert it to safetensors with PEFT" if pickled else ""
        if not path.exists() and not path.is_absolute():
            hint = "; a name on the Hub is downloaded with huggingface_hub.snapshot_download, which gives the folder"
        raise AdapterFileError(f"there is no file {weights}{hint}")
    try:
        check_header(weights)
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{weights} cannot be read: {error}") from None
    try:
        if path.suffix == ".safetensors" and "adapter_config" in metadata:
            text = metadata["adapter_config"]
        else:
            text = _config_text(weights.parent / CONFIG)
        fields = json.loads(text)
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {CONFIG} beside {weights}, nor one in its metadata") from None
    except RecursionError:
        raise AdapterFileError(f"the {CONFIG} of {weights} is nested too deeply to be a config") from None
    except ValueError as error:
        raise AdapterFileError(f"the {CONFIG} of {weights} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterFileError(f"the {CONFIG} of {weights} must be an object, got {type(fields).__name__}")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{weights}: {key} holds values that are not finite numbers")
    return fields, tensors


def _config_text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterFileError(f"{path} has {path.stat().st_size:,} bytes, which is no config")
    return path.read_text(encoding="utf-8")


# -- filling and checking ------------------------------------------------------------------------------------


def _fill(path: Any, model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into the task, if they are exactly those that it has."""
    owners, found = {}, {}
    for place, layer in places(model, name).items():
        for end, tensor in layer.file_tensors(name).items():
            owners[key_of(place, end)], found[key_of(place, end)] = layer, tensor
    own = without_followers(found)
    theirs = {plain_key(key): (key, tensor) for key, tensor in tensors.items()}
    for key, tensor in own.items():
        if key not in theirs:
            if ".start." in key:  # PEFT does not write it: `inject` has computed it, as PEFT would
                continue
            raise AdapterFileError(f"{path}: {key} is missing")
        have = theirs[key][1]
        if have.shape != tensor.shape:
            why = owners[key].not_for_peft(name)
            raise AdapterFileError(
                f"{path}: {key} has shape {tuple(have.shape)}, and the layer with this config has "
                f"{tuple(tensor.shape)}{'' if why is None else f'; of a file that PEFT wrote: {why}'}"
            )
    for key, (written, _) in theirs.items():
        if key not in own:
            raise AdapterFileError(
                f"{path}: {written} is unexpected: a task with this config has no such tensor"
            )
    with torch.no_grad():
        for key, tensor in own.items():
            if key in theirs:
                tensor.copy_(_placed(theirs[key][1], tensor))


@contextmanager
def _undone_on_error(model: nn.Module, name: str) -> Iterator[None]:
    """If the block raises, the model is what it was before: without the task, with its route and what trained."""
    state = find_state(model)
    route = None if state is None else state.default
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if name in tasks(model):
            remove(model, name)
        for parameter, before in trained:
            parameter.requires_grad_(before)
        if state is not None:
            state.set_default(route)
        raise


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a memory of its own for each, as safetensors asks for: a bias may be shared."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[key] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


# -- sharded models ------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Does each rank hold a part of the parameters only (DTensor)?"""
    return any(_is_part(parameter) for parameter in model.parameters())


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # by its method: importing DTensor takes half a second


def whole(tensor: Tensor) -> Tensor:
    """The tensor without gradient, of a sharded one all of it: then every rank must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_part(tensor) else tensor  # type: ignore[attr-defined]


def _placed(value: Tensor, like: Any) -> Tensor:
    if not _is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

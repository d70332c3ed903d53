"""Adapters on disk, in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

    base_model.model.<layer>.lora_A.weight              (r, in)
    base_model.model.<layer>.lora_B.weight              (out, r)
    base_model.model.<layer>.lora_magnitude_vector      (out,)     DoRA only

PEFT and vLLM load what is written here, and the reverse. A path that ends in `.safetensors` means one file,
with the config in its metadata. Nothing but safetensors and JSON is read: no pickle.

Writing is atomic: a new folder appears complete or not at all; in an existing one each file is replaced
whole. Loading is strict and checks everything before it touches the model.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import AdapterFileError, ConfigError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import (
    InjectReport,
    inject,
    set_trainable,
    task_config,
    task_layers,
    tasks,
    unwrapped,
)
from orbit.adapter.kinds import kind_of
from orbit.adapter.owners import Down, Owner, Tasks, Up
from orbit.adapter.targets import nearest
from orbit.core.files import sync_folder, write_synced

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_KEY = re.compile(
    r"base_model\.model\.(?:(?P<layer>.+)\.)?(?P<end>lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_COPY = re.compile(r"base_model\.model\.(?P<layer>.+)\.base_layer\.weight")
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}


def save(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> Path:
    """Write a task to `path`: a folder in PEFT's format, or one file if it ends in `.safetensors`.

    Raises:
        TaskError: no such task. OSError: from the file system; then the former content is still there.
    """
    model = _root(model)
    path = Path(path)
    layers = {_clean(raw): layer for raw, layer in task_layers(model, name).items()}
    tensors = {
        _key(layer_name, bank): owner.weight.detach().cpu().contiguous()  # type: ignore[operator]
        for layer_name, layer in layers.items()
        for bank, owner in _plain_owners(layer, name).items()
    }
    fields = task_config(model, name).as_plain().to_peft(_target_modules(model, set(layers)))
    fields["base_model_name_or_path"] = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    fields["task_type"] = "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None
    config = json.dumps(fields, indent=2, sort_keys=True)
    if path.suffix == ".safetensors":
        content = to_bytes(tensors, {"format": "pt", "adapter_config": config})
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_files(path.parent, {path.name: content})
    else:
        _write_folder(path, {WEIGHTS: to_bytes(tensors, {"format": "pt"}), CONFIG: config.encode()})
    return path


def load(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, trainable: bool = False
) -> InjectReport | None:
    """Read a task from `path` into the model, injecting it if the model has no task of this name.

    Args:
        model: the base model that the adapter was trained on, with or without other tasks.
        path: a folder in PEFT's format or a `.safetensors` file written by `save`.
        name: what to call the task; what it was called when saved does not matter.
        trainable: whether an injected task trains. An existing one keeps its state.

    Returns:
        The report of the injection, or None if the task was there.

    Raises:
        AdapterFileError: naming the key or field that is missing, unexpected, of the wrong shape or not
            finite.
        ConfigError: a field of PEFT's config cannot be honoured. The model is unchanged.
    """
    model = _root(model)
    fields, tensors = read(path)
    layers = {
        _clean(raw): (raw, module) for raw, module in model.named_modules() if kind_of(module) is not None
    }
    found = _by_layer(path, _without_copies(tensors, {name: module for name, (_, module) in layers.items()}))
    for layer_name in found:
        if layer_name not in layers:
            close = nearest(layer_name, layers)
            hint = f"; the nearest layer is {close!r}" if close else ""
            key = _key(layer_name, next(iter(found[layer_name])))
            raise AdapterFileError(
                f"{path}: {key} belongs to no adaptable layer of {type(model).__name__}{hint}"
            )
    config = AdapterConfig.from_peft(fields, layers=[layers[layer_name][0] for layer_name in found])
    _check_coverage(path, fields, set(found), set(layers))
    for layer_name, banks in found.items():
        module = layers[layer_name][1]
        _check_layer(path, layer_name, banks, config, module.in_features, module.out_features)

    report = None
    if name in tasks(model):
        _check_same(path, model, name, config, {layers[layer_name][0] for layer_name in found})
    else:
        report = inject(model, config, name)
        if not trainable:
            set_trainable(model, name, False)
            report = replace(report, trainable=sum(p.numel() for p in model.parameters() if p.requires_grad))
    with torch.no_grad():
        for raw, layer in task_layers(model, name).items():
            for bank, owner in layer.owners(name).items():
                owner.weight.copy_(found[_clean(raw)][bank])  # type: ignore[operator]
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
        raise AdapterFileError(f"there is no file {weights}{hint}")
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise AdapterFileError(f"{weights} cannot be read: {error}") from None
    try:
        if path.suffix == ".safetensors" and "adapter_config" in metadata:
            text = metadata["adapter_config"]
        else:
            text = (weights.parent / CONFIG).read_text()
        fields = json.loads(text)
    except FileNotFoundError:
        raise AdapterFileError(f"there is no {CONFIG} beside {weights}, nor one in its metadata") from None
    except ValueError as error:
        raise AdapterFileError(f"the {CONFIG} of {weights} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise AdapterFileError(f"the {CONFIG} of {weights} must be an object, got {type(fields).__name__}")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{weights}: {key} holds values that are not finite numbers")
    return fields, tensors


def _plain_owners(layer: Graft, name: str) -> dict[str, nn.Module]:
    """A layer's owners for a task, those with a start as owners of twice the rank (`AdapterConfig.as_plain`)."""
    owners = layer.owners(name)
    for bank, owner in owners.items():
        start = getattr(owner, "start", None)
        if isinstance(start, Up):
            owners[bank] = Owner(torch.cat([owner.weight, -start.weight], 1))  # type: ignore[list-item]
        elif isinstance(start, Down):
            owners[bank] = Owner(torch.cat([owner.weight, start.weight], 0))  # type: ignore[list-item]
    return owners


# -- checking ------------------------------------------------------------------------------------------------


def _without_copies(tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Without the weights of an adapted head, which PEFT saves beside its adapter, where the model has the same."""

    def is_copy(key: str, tensor: Tensor) -> bool:
        match = _COPY.fullmatch(key)
        layer = layers.get(match["layer"]) if match else None
        weight = None if layer is None else getattr(layer, "weight", None)
        return isinstance(weight, Tensor) and torch.equal(tensor.to(weight), weight)

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key, tensor)}


def _by_layer(path: Any, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterFileError(
                f"{path}: {key} is unexpected: neither lora_A, lora_B nor lora_magnitude_vector of a layer "
                "(a weight that differs from the base model's, or of a kind of adapter that cannot be loaded)"
            )
        bank = next(bank for bank, end in _KEYS.items() if match["end"].startswith(end))
        found.setdefault(match["layer"] or "", {})[bank] = tensor
    if not found:
        raise AdapterFileError(f"{path} holds no tensors")
    return found


def _check_coverage(path: Any, fields: Mapping[str, Any], found: set[str], layers: set[str]) -> None:
    """The layers that PEFT's targets name must be those that the file has."""
    targets, exclude = fields.get("target_modules"), fields.get("exclude_modules")
    if not targets or targets == "all-linear" or fields.get("layers_to_transform") not in (None, []):
        return
    meant = {
        name for name in layers if _peft_match(targets, name) and not (exclude and _peft_match(exclude, name))
    }
    for name in sorted(meant - found):
        raise AdapterFileError(
            f"{path}: {_key(name, 'lora_A')} is missing; target_modules={targets!r} names the layer"
        )
    for name in sorted(found - meant):
        raise AdapterFileError(
            f"{path}: {_key(name, 'lora_A')} is unexpected; target_modules={targets!r} omits it"
        )


def _check_layer(
    path: Any,
    name: str,
    banks: Mapping[str, Tensor],
    config: AdapterConfig,
    in_features: int,
    out_features: int,
) -> None:
    r = config.rank_of(name)
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (r, in_features), "lora_B": (out_features, r)}
    if config.dora:
        wanted["lora_magnitude"] = (out_features,)
    for bank, shape in wanted.items():
        if bank not in banks:
            raise AdapterFileError(f"{path}: {_key(name, bank)} is missing")
        if tuple(banks[bank].shape) != shape:
            raise AdapterFileError(
                f"{path}: {_key(name, bank)} has shape {tuple(banks[bank].shape)}, but rank {r} on a layer "
                f"{in_features} -> {out_features} asks for {shape}"
            )
    for bank in banks:
        if bank not in wanted:
            raise AdapterFileError(f"{path}: {_key(name, bank)} is unexpected: use_dora is false")


def _check_same(path: Any, model: nn.Module, name: str, config: AdapterConfig, layers: set[str]) -> None:
    own = task_config(model, name)
    have = task_layers(model, name)
    for raw in sorted(layers ^ set(have)):
        side = "the model" if raw in have else "the file"
        raise AdapterFileError(f"{path}: only {side} adapts layer {raw!r}; load under another name")
    for label, theirs, ours in [
        *((f, getattr(config, f), getattr(own, f)) for f in ("dora", "rslora")),
        *((f"rank of {raw}", config.rank_of(raw), own.rank_of(raw)) for raw in have),
        *((f"alpha of {raw}", config.alpha_of(raw), own.alpha_of(raw)) for raw in have),
    ]:
        if theirs != ours:
            raise AdapterFileError(
                f"{path}: {label} is {theirs}, but {ours} in task {name!r}; load under another name"
            )


# -- names ---------------------------------------------------------------------------------------------------


def _root(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def _clean(name: str) -> str:
    """A layer's name without the segments that torch.compile and checkpoint wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _key(layer: str, bank: str) -> str:
    return ".".join(part for part in ("base_model.model", layer, _KEYS[bank]) if part)


def _target_modules(model: nn.Module, layers: set[str]) -> list[str] | str:
    """The adapted layers as PEFT finds just them: last segments, else full names, else an expression."""
    names = [_clean(raw) for raw, module in model.named_modules() if not isinstance(module, (Tasks, Owner))]
    for candidate in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {name for name in names if _peft_match(candidate, name)} == layers:
            return candidate
    return "|".join(re.escape(name) for name in sorted(layers))


def _peft_match(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ConfigError(f"{targets!r} is not a regular expression: {error}") from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


# -- writing -------------------------------------------------------------------------------------------------


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    if folder.is_dir():
        _replace_files(folder, files)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        for name, content in files.items():
            write_synced(new / name, content)
        sync_folder(new)
        os.rename(new, folder)
    sync_folder(folder.parent)


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix=".orbit.", dir=folder) as scratch:
        for name, content in files.items():
            write_synced(Path(scratch) / name, content)
        for name in files:
            os.replace(Path(scratch) / name, folder / name)
    sync_folder(folder)

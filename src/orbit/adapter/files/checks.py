"""Whether a file is about this model: what its config says against what its keys, the model and the task say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter.config import STARTS_FROM_WEIGHT, AdapterConfig
from orbit.adapter.errors import AdapterFileError, ConfigError
from orbit.adapter.files.peft_keys import Named, key_of
from orbit.adapter.inject import task_config, task_layers
from orbit.adapter.kinds.registry import kind_of
from orbit.adapter.owners import Owner, Tasks, TokenSlot
from orbit.core.patterns import Pattern, clean

_WITHIN = re.compile(r"\.(modules_to_save|original_module)\.(.*\.)?bias$")
_COPY = re.compile(r"base_model\.model\.(?P<layer>.+?)(\.base_layer)?\.weight")


def check_auto_mapping(path: Any, fields: Mapping[str, Any], model: nn.Module) -> None:
    """PEFT would import the class that this field names. Here nothing is, and it must be the model's."""
    mapping = fields.get("auto_mapping")
    if not mapping:
        return
    wanted = mapping.get("base_model_class") if isinstance(mapping, dict) else mapping
    if wanted not in {cls.__name__ for cls in type(model).__mro__}:
        raise AdapterFileError(
            f"{path}: auto_mapping={mapping!r} names a class to import, and the model is a {type(model).__name__}; "
            "nothing is imported for a file: load it into the model it was made for, or delete the field"
        )


def without_copies(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Without what PEFT writes twice.

    The weights of embedding and head beside an adapter, where the model has the same; and with bias="all" those
    biases of a module that is trained whole which it also writes under the module's own name.
    """
    trained = fields.get("modules_to_save")
    trained = trained if isinstance(trained, list) else []
    twice = bool(trained) and fields.get("bias") == "all"

    def is_copy(key: str, tensor: Tensor) -> bool:
        match = _COPY.fullmatch(key)
        if match and any(f".{name}." in f".{match['layer']}." for name in trained):
            return False
        weight = getattr(modules.get(match["layer"]), "weight", None) if match else None
        return (
            isinstance(weight, Tensor)
            and weight.shape == tensor.shape
            and torch.equal(tensor.to(weight), weight)
        )

    return {
        key: tensor
        for key, tensor in tensors.items()
        if not is_copy(key, tensor) and not (twice and _WITHIN.search(key))
    }


def check_coverage(path: Any, fields: Mapping[str, Any], named: Named, model: nn.Module) -> None:
    """The layers that PEFT's targets name must be those that the file has."""
    targets, exclude = fields.get("target_modules"), fields.get("exclude_modules")
    if not targets or targets == "all-linear" or fields.get("layers_to_transform") not in (None, []):
        return
    names = {clean(raw): module for raw, module in model.named_modules()}
    found = {clean(raw) for raw in named.layers}
    meant = {
        name
        for name, module in names.items()
        if kind_of(module) is not None
        and not isinstance(names.get(name.rpartition(".")[0]), nn.MultiheadAttention)
        and not any(name == raw or name.startswith(f"{raw}.") for raw in map(clean, named.copies))
        and _peft_match(targets, name)
        and not (exclude and _peft_match(exclude, name))
    }
    for name in sorted(meant - found):
        raise AdapterFileError(
            f"{path}: {key_of(name, 'lora_A.weight')} is missing; target_modules={targets!r} names the layer"
        )
    for name in sorted(found - meant):
        raise AdapterFileError(
            f"{path}: {key_of(name, 'lora_A.weight')} is unexpected; target_modules={targets!r} omits it"
        )


def check_same(path: Any, model: nn.Module, name: str, config: AdapterConfig) -> None:
    """The settings with which the file's tensors were trained must be those of the task that they are to fill."""
    own = task_config(model, name)
    have = task_layers(model, name)
    slots = {clean(raw): layer.slots()[name] for raw, layer in have.items()}
    rows = {raw: slot.rows.indices for raw, slot in slots.items() if isinstance(slot, TokenSlot)}
    assert isinstance(config.tokens, Mapping) or config.tokens == ()
    for label, theirs, ours in [
        *((f, getattr(config, f), getattr(own, f)) for f in ("dora", "rslora", "gated", "bias")),
        ("the start that A and B are counted from", _start(config), _start(own)),
        *(
            (f"the rows of {raw}", indices, rows.get(clean(raw.removeprefix("re:"))))
            for raw, indices in dict(config.tokens).items()
        ),
        *((f"rank of {raw}", config.rank_of(raw), own.rank_of(raw)) for raw in have),
        *((f"alpha of {raw}", config.alpha_of(raw), own.alpha_of(raw)) for raw in have),
    ]:
        if theirs != ours:
            raise AdapterFileError(
                f"{path}: {label} is {theirs}, but {ours} in task {name!r}; load under another name"
            )


def has_ranks(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Are there tensors of the config's ranks? Else it asks for memory that the file itself does not need."""
    most = max((len(t) for key, t in tensors.items() if "lora_A." in key or key.endswith("_A")), default=0)
    return max(config.r, *config.rank_pattern.values(), 0) <= most


def _start(config: AdapterConfig) -> str:
    return config.init if config.init in STARTS_FROM_WEIGHT else "none"


def plain_key(key: str) -> str:
    """PEFT writes a magnitude's key without `.weight`, and reads it with."""
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def target_modules(model: nn.Module, layers: set[str]) -> list[str] | str:
    """The adapted layers as PEFT finds just them: last segments, else full names, else an expression."""
    names = [clean(raw) for raw, module in model.named_modules() if not isinstance(module, (Tasks, Owner))]
    for candidate in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {name for name in names if _peft_match(candidate, name)} == layers:
            return candidate
    return "|".join(re.escape(name) for name in sorted(layers))


def _peft_match(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return Pattern(targets, "target_modules or exclude_modules", ConfigError).fullmatch(name)
    return any(name == target or name.endswith(f".{target}") for target in targets)

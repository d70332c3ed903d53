"""What PEFT's files call the layers of a task, and which layers a file's keys name.

    base_model.model.<place>.<end>

A layer's place is its name, but for two kinds, where PEFT's wrappers show:

    attention                 <name> for in_proj_weight, <name>.base_layer.out_proj for its out_proj
    parameters of a module    <name>.base_layer.base_layer … one `base_layer` for every adapted parameter that the
                              module registered later; the parameter itself is named in the config alone

Beside low-rank tensors: <name>.base_layer.bias of an adapted layer and <name>.bias of others, for a task with biases
of its own; <name>.token_adapter.trainable_tokens_delta for rows, whose indices the config has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from orbit.adapter.config import BIASES
from orbit.adapter.errors import AdapterFileError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import task_layers
from orbit.adapter.kinds.registry import kind_of, wrapper_of
from orbit.adapter.kinds.whole import ParameterSite
from orbit.adapter.owners import BiasSlot, TokenSlot
from orbit.core.names import nearest
from orbit.core.patterns import clean

PREFIX = "base_model.model"
_KEY = re.compile(r"(?:(?P<place>.+?)\.)?(?P<end>lora_\w+(?:\.\w+)*)")
_OUT = ".base_layer.out_proj"
_ROWS = "token_adapter.trainable_tokens_delta"


class Named(NamedTuple):
    """What a file is about, by full names in the model: layers, parameters, modules that it holds whole, token rows."""

    layers: list[str]
    parameters: list[str]
    copies: list[str]
    tokens: dict[str, list[int]]


def key_of(place: str, end: str) -> str:
    """The key of a tensor."""
    return ".".join(part for part in (PREFIX, place, end) if part)


def places(model: nn.Module, task: str) -> dict[str, Graft]:
    """The layers that carry a task, by their places in a file."""
    layers = task_layers(model, task)
    found = {}
    for path, layer in layers.items():
        place = clean(path)
        above = place.rpartition(".")[0]
        slot = layer.slots()[task]
        if isinstance(slot, BiasSlot):
            if isinstance(layer, ParameterSite):
                host = layer.home()[0]
                hosted = [site for site in layers.values() if _host(site) is host and site is not layer]
                place = above + ".base_layer" * len(hosted)
        elif isinstance(layer, ParameterSite):
            host, name = layer.home()
            if not isinstance(host, nn.MultiheadAttention):
                same = [
                    site.parameter
                    for site in layers.values()
                    if _host(site) is host and not isinstance(site.slots()[task], BiasSlot)
                ]
                later = [key for key in host._parameters if key in same]
                place = above + ".base_layer" * (len(later) - 1 - later.index(name))
            elif name == "in_proj_weight":
                place = above
        elif isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):
            place = above + _OUT
        found[place] = layer
    return found


def targets_of(model: nn.Module, task: str) -> tuple[set[str], list[str], list[str]]:
    """What a config must name for these layers: layers, parameters, modules trained whole; by clean names."""
    layers, parameters, copies = set(), [], []
    for path, layer in task_layers(model, task).items():
        name = clean(path)
        above = name.rpartition(".")[0]
        if isinstance(layer.slots()[task], (BiasSlot, TokenSlot)):
            continue
        if layer.holds_copy(task):
            copies.append(name)
        elif isinstance(layer, ParameterSite) and not isinstance(_host(layer), nn.MultiheadAttention):
            parameters.append(name)
        elif isinstance(layer, ParameterSite) or isinstance(
            model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention
        ):
            layers.add(above)
        else:
            layers.add(name)
    return layers, parameters, copies


def rows_of(model: nn.Module, task: str) -> dict[str, list[int]]:
    """The rows that a task has of its own, by the clean names of the layers that are written."""
    found: dict[str, list[int]] = {}
    written: set[int] = set()
    for place, layer in places(model, task).items():
        slot = layer.slots()[task]
        if isinstance(slot, TokenSlot) and id(slot.rows) not in written:
            written.add(id(slot.rows))
            found[place] = list(slot.rows.indices)
    return found


def without_followers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by key, without the rows of layers that share the weight of an earlier one."""
    seen: set[int] = set()
    kept = {}
    for key, tensor in tensors.items():
        if not key.endswith(_ROWS) or tensor.data_ptr() not in seen:
            kept[key] = tensor
            seen.add(tensor.data_ptr())
    return kept


def named_in(path: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module) -> Named:
    """What a file's keys and config name.

    Raises:
        AdapterFileError: a key that belongs to nothing in the model, or a name that nothing has.
    """
    modules = {clean(raw): (raw, module) for raw, module in model.named_modules()}
    own = {
        f"{name}.{key}" if name else key: (raw, key)
        for name, (raw, module) in modules.items()
        for key in module._parameters
    }
    parameters = _suffixed(path, "target_parameters", fields.get("target_parameters"), own)
    # PEFT adds "classifier" and "score" for every classifier, whatever its head is called.
    copies = _suffixed(path, "modules_to_save", fields.get("modules_to_save"), modules, all_of_them=False)
    hosts = {name.rpartition(".")[0] for name in parameters}
    layers: dict[str, None] = {}
    tokens: dict[str, list[int]] = {}
    for key in tensors:
        rest = key.removeprefix(f"{PREFIX}.")
        if any(rest.startswith(f"{name}.") for name in copies):
            continue
        if f".{rest}".endswith(f".{_ROWS}"):
            name = rest.removesuffix(_ROWS).removesuffix(".")
            raw = modules[name][0] if name in modules else name
            tokens[raw] = _indices(path, fields.get("trainable_token_indices"), name)
            continue
        match = _KEY.fullmatch(rest)
        if match is None and f".{rest}".endswith(".bias") and fields.get("bias") in BIASES[1:]:
            continue  # `load` compares it with the biases that the task has
        if match is None or rest == key:
            raise AdapterFileError(
                f"{path}: {key} is unexpected: no tensor of an adapter (a weight that differs from the base model's, "
                "or of a kind of adapter that cannot be loaded)"
            )
        place = match["place"] or ""
        if re.sub(r"(\.base_layer)+$", "", place) in hosts:
            continue
        above = place.removesuffix(_OUT) if place.endswith(_OUT) else place.rpartition(".")[0]
        if above in modules and isinstance(modules[above][1], nn.MultiheadAttention):
            place = above
        if place not in modules or not _adaptable(modules[place][1]):
            adaptable = [name for name, (_, module) in modules.items() if _adaptable(module)]
            close = nearest(place, adaptable)
            hint = f"; the nearest layer is {close!r}" if close else ""
            raise AdapterFileError(
                f"{path}: {key} belongs to no adaptable layer of {type(model).__name__}{hint}"
            )
        layers[modules[place][0]] = None
    full = [".".join(part for part in own[name] if part) for name in parameters]
    return Named(list(layers), full, [modules[name][0] for name in copies], tokens)


def _indices(path: Any, given: Any, name: str) -> list[int]:
    """The indices that the config gives for the layer of this name."""
    if isinstance(given, Mapping):
        given = next((rows for key, rows in given.items() if name == key or name.endswith(f".{key}")), None)
    if not isinstance(given, list):
        raise AdapterFileError(f"{path}: trainable_token_indices has no list of indices for {name!r}")
    return given


def _adaptable(module: nn.Module) -> bool:
    return kind_of(module) is not None or wrapper_of(module) is not None


def _suffixed(
    path: Any, field: str, wanted: Any, names: Iterable[str], *, all_of_them: bool = True
) -> list[str]:
    """The names that end in one of those that the config lists, each of which must be an end of one."""
    if not wanted:
        return []
    if not isinstance(wanted, list) or not all(isinstance(name, str) and name for name in wanted):
        raise AdapterFileError(f"{path}: {field}={wanted!r} must be a list of names")
    found = []
    for name in wanted:
        hits = [own for own in names if own == name or own.endswith(f".{name}")]
        if not hits and all_of_them:
            raise AdapterFileError(f"{path}: {field} names {name!r}, which nothing in the model is called")
        found += [hit for hit in hits if hit not in found]
    return found


def _host(layer: Graft) -> nn.Module | None:
    return layer.home()[0] if isinstance(layer, ParameterSite) else None

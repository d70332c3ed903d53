"""Rows of an embedding that a task trains: `AdapterConfig(tokens=[3, 5])`.

    W'[i] = row_i of the task for the indices i that are named, W[i] for all others

    W (num, dim)   rows (n, dim): copies of W[i] at the start, so that a fresh task changes nothing

For a few new or special tokens, where a copy of the whole embedding would be hundreds of megabytes. Every layer
that shares W uses the same rows: a tied head computes x·W'ᵀ (`linear.py`), as it would with the whole W' trained.
A linear layer may be named too, a head that is not tied: rows of its weight are its outputs.

What torch does to the gradient of a row of W (`padding_idx`, `scale_grad_by_freq`), it does to the task's.

PEFT keeps such rows as `<embedding>.token_adapter.trainable_tokens_delta`: the rows themselves, in the order of the
indices; nothing for a tied head. As there, a layer has either such rows or a low-rank update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import ConfigError, TargetError
from orbit.adapter.graft import Graft
from orbit.adapter.kinds.dense import DenseGraft
from orbit.adapter.kinds.embedding import EmbeddingGraft
from orbit.adapter.kinds.linear import LinearGraft
from orbit.adapter.kinds.registry import mixin_of, refusal
from orbit.adapter.owners import TokenSlot
from orbit.adapter.targets import matches
from orbit.core.names import did_you_mean
from orbit.core.tree import tree


class Rows(NamedTuple):
    """Rows of the weight of a module that a task is to have of its own."""

    module: nn.Module
    indices: tuple[int, ...]


class SharedRows:
    """Makes a task's rows, the same for every layer that shares a weight."""

    def __init__(self) -> None:
        self._slots: dict[int, TokenSlot] = {}

    def make(self, layer: Graft, indices: tuple[int, ...]) -> TokenSlot:
        assert isinstance(layer, DenseGraft)
        key = id(layer._parameters["weight"])
        if key not in self._slots:
            self._slots[key] = layer.new_rows(indices)
        return self._slots[key]


def resolve_tokens(model: nn.Module, config: AdapterConfig) -> dict[str, Rows]:
    """The layers of which a config names rows, and those that share their weights, by dotted name.

    Raises:
        TargetError: a name that matches nothing, or no embedding or linear layer; a list, where the model has not one
            embedding; a layer that cannot be adapted.
        ConfigError: an index beyond the last row; layers with one weight and different indices.
    """
    modules, parents = tree(model)
    named = config.tokens if isinstance(config.tokens, Mapping) else {}
    if config.tokens and not named:
        assert isinstance(config.tokens, tuple)
        named = {_input_embedding(model, modules): config.tokens}
    found: dict[str, Rows] = {}
    for name, indices in named.items():
        for path in matches(name, modules) if name not in modules else [name]:
            rows = _checked(name, path, modules[path], indices)
            for other, module in modules.items():
                if module is not rows.module and not _shares(module, rows.module):
                    continue
                if found.get(other, rows).indices != indices:
                    raise ConfigError(f"tokens gives {other!r} both {found[other].indices} and {indices}")
                why = (
                    refusal(module, parents[other])
                    if _has_rows(module)
                    else "it is no embedding or linear layer"
                )
                if why is not None:
                    shared = "" if other == path else f", which shares the weight of {path!r},"
                    raise TargetError(f"{other!r}{shared} cannot have rows of a task: {why}")
                found[other] = Rows(module, indices)
        if not any(matches(name, [path]) or path == name for path in found):
            known = {path.rpartition(".")[2] for path, module in modules.items() if _has_rows(module)}
            raise TargetError(f"tokens names {name!r}, which no module matches{did_you_mean(name, known)}")
    return found


def _checked(name: str, path: str, module: nn.Module, indices: tuple[int, ...]) -> Rows:
    if not _has_rows(module):
        raise TargetError(
            f"tokens names {name!r}: {path!r} is a {type(module).__name__}, no embedding or linear layer"
        )
    num = mixin_of(module).matrix_shape(module)  # type: ignore[union-attr, arg-type]
    last = (num[1] if isinstance(module, nn.Embedding) else num[0]) - 1
    for index in indices:
        if index > last:
            raise ConfigError(f"tokens: {path!r} has the rows 0 to {last}, and none numbered {index}")
    return Rows(module, indices)


def _has_rows(module: nn.Module) -> bool:
    mixin = mixin_of(module)
    return mixin is not None and issubclass(mixin, (EmbeddingGraft, LinearGraft))


def _shares(module: nn.Module, other: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight is other._parameters.get("weight")


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The name of the embedding that a list of indices means."""
    get = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            wanted = get()
        except NotImplementedError:  # transformers' models without such
            wanted = None
        for path, module in modules.items():
            if module is wanted:
                return path
    found = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(found) != 1:
        have = f"{len(found)} embeddings ({', '.join(map(repr, found[:4]))})" if found else "no embedding"
        raise TargetError(f"{type(model).__name__} has {have}; say whose rows: tokens={{name: [indices]}}")
    return found[0]

"""Weights of a Llama (or Mistral, Qwen3) for a `Transformer`, which has its names.

Nothing is loaded unless everything fits: every tensor there and of its shape, none left over, and where the source
brings its settings, those that weights do not show (heads, rotary base and scaling, norm eps, window) are the model's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orbit.core.loaded import mark_loaded
from orbit.core.safetensors_header import check_header
from orbit.model.decoder.config import TransformerConfig
from orbit.model.decoder.transformer import Transformer
from orbit.model.errors import SettingError, WeightsError

__all__ = ["load_llama_weights"]

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPUTED = "rotary_emb.inv_freq"  # old checkpoints hold it, one a layer
# Settings that change what the weights compute, and that the weights' shapes do not tell.
_HIDDEN = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rope_base",
    "rope_scaling",
    "norm_eps",
    "window",
    "activation",
)


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def load_llama_weights(
    model: Transformer, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
) -> Transformer:
    """Copy the weights of a Llama into `model`, in the model's dtype and on its device.

    Args:
        model: built with `TransformerConfig.from_llama(...)`, or with equal settings.
        source: transformers' model, its state dict, or the folder of one (config.json and safetensors).

    Returns:
        The same model.

    Raises:
        WeightsError: a tensor is missing, unexpected or of another shape, a file is damaged, or the source is tied
            where the model is not. SettingError: the source's settings are others. The model is unchanged.
        OSError: the folder cannot be read.

    >>> model = Transformer(TransformerConfig.from_llama(llama.config))     # doctest: +SKIP
    >>> load_llama_weights(model, llama)                                    # doctest: +SKIP
    """
    with _entries(source) as (entries, settings):
        if settings is not None:
            _check_settings(model.config, settings)
        own = dict(model.named_parameters())
        theirs = {name: entry for name, entry in entries.items() if not name.endswith(_COMPUTED)}
        if _HEAD not in own and _HEAD in theirs:
            _check_tied(theirs)
            theirs.pop(_HEAD)
        _check_names(own, theirs)
        for name, parameter in own.items():
            if parameter.is_meta:
                raise WeightsError(f"{name} is on the meta device: call model.to_empty(device=...) first")
            if theirs[name].shape != tuple(parameter.shape):
                raise WeightsError(
                    f"{name} has the shape {theirs[name].shape}, and the model's has {tuple(parameter.shape)}: build "
                    "the model with the source's sizes, TransformerConfig.from_llama(its config)"
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(theirs[name].read())
    mark_loaded(model)
    return model


# -- sources -------------------------------------------------------------------------------------------------


@contextmanager
def _entries(source: Any) -> Iterator[tuple[dict[str, _Entry], Any]]:
    """The source's tensors, read when they are needed, and its settings if it brings them."""
    if isinstance(source, nn.Module):
        yield _of_mapping(source.state_dict()), getattr(source, "config", None)
    elif isinstance(source, Mapping):
        yield _of_mapping(source), None
    elif isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        with ExitStack() as files:
            entries: dict[str, _Entry] = {}
            for path in _shards(folder):
                for name, entry in _of_file(path, files).items():
                    if name in entries:
                        raise WeightsError(f"{path}: {name} is in another file of {folder} too")
                    entries[name] = entry
            yield entries, folder
    else:
        raise WeightsError(
            f"weights come from a model, a state dict or a folder, not from {type(source).__name__}"
        )


def _of_mapping(tensors: Mapping[str, Tensor]) -> dict[str, _Entry]:
    return {
        name: _Entry(tuple(tensor.shape), lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    }


def _of_file(path: Path, files: ExitStack) -> dict[str, _Entry]:
    try:
        check_header(path)
        file = files.enter_context(safe_open(path, "pt"))
    except (ValueError, SafetensorError) as error:
        raise WeightsError(f"{path} is no readable safetensors file: {error}") from None
    return {
        name: _Entry(tuple(file.get_slice(name).get_shape()), lambda name=name: file.get_tensor(name))  # type: ignore[misc]
        for name in file.keys()  # noqa: SIM118 (it is no dict)
    }


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        one = folder / "model.safetensors"
        if not one.is_file():
            raise WeightsError(
                f"{folder} has no model.safetensors: load the model with transformers, and give it or what its "
                "save_pretrained writes"
            )
        return [one]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        plain = all(Path(name).name == name for name in names)
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
        raise WeightsError(f"{index} does not say in which files the weights are") from None
    missing = [name for name in names if not plain or not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"{index} names {missing[0]}, which is not in the folder")
    return [folder / name for name in names]


# -- checks --------------------------------------------------------------------------------------------------


def _check_settings(ours: TransformerConfig, source: Any) -> None:
    theirs = TransformerConfig.from_llama(source)
    for name in _HIDDEN:
        one, other = getattr(ours, name), getattr(theirs, name)
        if one != other:
            raise SettingError(
                f"the source has {name} {other!r} and the model {one!r}, so the weights would mean something else: "
                "build the model with TransformerConfig.from_llama(its config)"
            )


def _check_tied(theirs: Mapping[str, _Entry]) -> None:
    """The source's head must be its embedding where the model has no head of its own."""
    if _EMBEDDING in theirs and not torch.equal(theirs[_HEAD].read(), theirs[_EMBEDDING].read()):
        raise WeightsError(
            f"{_HEAD} is not {_EMBEDDING}: the source is not tied, so build the model with tie_embeddings=False"
        )


def _check_names(own: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    if missing == [_HEAD] and not unexpected:
        raise WeightsError(
            f"{_HEAD} is missing: the source is tied, so build the model with tie_embeddings=True"
        )
    if missing:
        raise WeightsError(f"{missing[0]} is missing, and {len(missing) - 1} more; the model was not changed")
    if unexpected:
        raise WeightsError(
            f"{unexpected[0]} is unexpected, and {len(unexpected) - 1} more; the model was not changed"
        )

"""Which models may keep what the two passes have computed, and what `generate` does with the others.

A kept key and value must be what a new pass over the longer text would compute. That is not so where a token sees
those after it (bidirectional attention), and where positions are encoded by the length of the text (dynamic and
long RoPE: every new token turns the keys before it). There a mixture generates without a cache, as the public
implementations always do, and says so once. A model that keeps a state which is no cache of keys and values (Mamba,
RWKV) is asked to run without it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orbit.xlora.errors import CacheError
from orbit.xlora.generation.cache import TwinCache, twin

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

# Under which names other models keep what they have read; the last is that of paged batching.
_STATES = ("cache_params", "state", "rnn_state", "mems", "past_buckets_states", "cache")
_MOVING_ROPE = ("dynamic", "longrope")


def why_stateless(model: nn.Module) -> str | None:
    """Why there is no cache of keys and values that a mixture of this model could make two of, or None."""
    name = type(model).__name__
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if "past_key_values" not in inspect.signature(type(model).forward).parameters or not (
        supports is None or supports()
    ):
        return f"{name} has no cache of keys and values, which a mixture would make two of"
    return None


def why_inexact(model: nn.Module) -> str | None:
    """Why the keys and values that this model has computed change with the text's length, or None."""
    for path, module in ("", model.config), *model.named_modules():
        if getattr(module, "is_causal", True) is False and not getattr(module, "is_cross_attention", False):
            return f"{path or 'it'} is bidirectional: what a token sees changes with those after it"
    for rope in _rope_types(model):
        if any(moving in rope for moving in _MOVING_ROPE):
            return (
                f"its positions are encoded by {rope!r} RoPE, which changes all keys with the text's length"
            )
    return None


def _rope_types(model: Any) -> Iterator[str]:
    """The kinds of rotary position encoding that the config names, one a kind of layer at most."""
    config = getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True)
    found = getattr(config, "rope_parameters", None) or {}
    for one in (found, *found.values()):
        if isinstance(one, Mapping) and isinstance(kind := one.get("rope_type"), str):
            yield kind


def cache_of(model: xLoRAModel, given: Mapping[str, Any]) -> TwinCache | None:
    """The pair for a forward's arguments: of the cache given, a new one where the model would make one, or None.

    A model that trains would make one too, and nobody would read it.

    Raises:
        CacheError: a cache is asked for that cannot be kept exactly, or that belongs to something else.
    """
    for name in _STATES:
        if given.get(name) is not None:
            raise CacheError(
                f"{name}= is a state of {type(model).__name__} that both passes of a mixture would write to; give the "
                "whole text without it, or generate with a cache of keys and values that is not paged"
            )
    cache, asked = given.get("past_key_values"), given.get("use_cache")
    if isinstance(cache, TwinCache):
        return twin(cache)
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    wanted = asked or (asked is None and getattr(config, "use_cache", False))
    if cache is None and (not wanted or (model.training and torch.is_grad_enabled())):
        return None
    why = why_stateless(model) or why_inexact(model)
    if why is not None:
        if cache is None and not asked:
            return None
        raise CacheError(f"{why}; pass use_cache=False")
    if cache is None:
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
    return twin(cache)


def generate_arguments(model: xLoRAModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `generate` for a mixture: without a cache where none can be exact, which is said once.

    A static cache on a GPU, which makes `generate` compile the forward, does not.

    Raises:
        CacheError: the model has no cache and was not told to do without, or the cache is a paged one.
    """
    given = dict(kwargs)
    if not model.xlora_acts():
        return given
    if "paged" in (_setting(model, given, "cache_implementation") or ""):
        raise CacheError(
            "paged batching keeps one cache for a model, and a mixture needs two; leave cache_implementation out"
        )
    given["disable_compile"] = True  # of the whole forward, which switches routes outside of graphs
    if _setting(model, given, "use_cache") is False:
        return given
    why = why_stateless(model)
    if why is not None:
        raise CacheError(f"{why}; model.generate(..., use_cache=False) runs both passes on the whole text")
    why = why_inexact(model)
    if why is None:
        return given
    if not model.__dict__.get("_xlora_said_uncached"):
        model.__dict__["_xlora_said_uncached"] = True
        warnings.warn(
            f"{type(model).__name__} generates without a cache, both passes on the whole text for every token: {why}",
            stacklevel=3,
        )
    return given | {"use_cache": False}


def _setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """A setting of generation: the call's, or its config's, or the model's, the first that is not None."""
    said = [given.get(name)]
    said += [
        getattr(config, name, None) for config in (given.get("generation_config"), model.generation_config)
    ]
    return next((value for value in said if value is not None), None)

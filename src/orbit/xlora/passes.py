"""The two passes of a mixture: how a forward of the model becomes scalings and then logits.

    scaling pass    h = decoder(tokens) with every expert scaled by v, under no_grad; v = 0 is the base model
    classifier      p = f(h), the prediction (`classifier.py`)
    main pass       model(tokens) under the route Scaled(experts, s)

A token's scalings depend on itself and what came before, as everything in a causal model, so both passes run
on new tokens alone where there is a cache (`cache.py`). The scaling pass stops at the last hidden state: no head,
no loss, no list of hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.adapter.routes.plan import Scaled
from orbit.adapter.routes.route import route
from orbit.xlora.cache import TwinCache
from orbit.xlora.classifier import applied
from orbit.xlora.errors import XLoRAError

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

# Of a causal LM's forward, what is for its head and its output alone.
_HEAD_ONLY = frozenset(
    {
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "shift_labels",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "past_key_values",
    }
)


def run(
    model: xLoRAModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The output of `forward`, the model's own, under the scalings that the classifier predicts."""
    given = dict(kwargs)
    if args:
        given |= inspect.signature(forward).bind_partial(*args).arguments
    twin = _twin(model, given)
    hidden = scaling_pass(model, given, twin)
    prediction = model.xlora_classifier(hidden, model.xlora_config)
    model.xlora_log.note(prediction)
    if twin is not None:
        given["past_key_values"] = twin.main
    as_tuple = given.get("return_dict") is False
    if as_tuple and twin is not None:
        given["return_dict"] = True
    with route(model, mixture(model, applied(prediction, model.xlora_config))):
        output = forward(**given)
    if twin is None:
        return output
    output.past_key_values = twin
    return output.to_tuple() if as_tuple else output


def mixture(model: xLoRAModel, scalings: Tensor) -> Scaled:
    """The route of these scalings (batch, seq, layers, experts)."""
    return Scaled(model.xlora_experts, scalings, model.xlora_places())


def scaling_pass(model: xLoRAModel, given: Mapping[str, Any], twin: TwinCache | None) -> Tensor:
    """The last hidden state (batch, seq, hidden) of the decoder for a forward's arguments, without gradient."""
    config = model.xlora_config
    passed = {key: value for key, value in given.items() if key not in _HEAD_ONLY}
    value = config.scaling_pass_value * config.global_scaling_weight
    chosen = route(model, tasks=dict.fromkeys(model.xlora_experts, value)) if value else route(model, None)
    with torch.no_grad(), chosen:
        output = decoder_of(model)(
            **passed,
            use_cache=twin is not None,
            past_key_values=None if twin is None else twin.scaling,
            return_dict=True,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM below its head.

    Raises:
        XLoRAError: it has none.
    """
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    if not isinstance(decoder, nn.Module) or decoder is model:
        decoder = getattr(model, "base_model", None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise XLoRAError(
            f"{type(model).__name__} is no causal language model of transformers: it has no decoder below a head"
        )
    return decoder


def _twin(model: Any, given: Mapping[str, Any]) -> TwinCache | None:
    """The caches of this forward: of the one given, new ones where the model would make one, or none.

    A model that trains would make one too, and nobody would read it.
    """
    cache = given.get("past_key_values")
    if cache is not None:
        return TwinCache.of(cache)
    config = model.config.get_text_config(decoder=True)
    if given.get("use_cache") is False or (model.training and torch.is_grad_enabled()):
        return None
    if not (given.get("use_cache") or getattr(config, "use_cache", False)):
        return None
    from transformers import DynamicCache

    return TwinCache.of(DynamicCache(config=config))

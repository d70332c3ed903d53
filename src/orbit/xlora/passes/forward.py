"""The two passes of a mixture: how a forward of the model becomes scalings and then logits.

    scaling pass    h = decoder(tokens) with every expert scaled by v, under no_grad; v = 0 is the base model
    classifier      p = f(h), the prediction (`classifier.py`)
    main pass       model(tokens) under the route Scaled(experts, s)

A token's scalings depend on itself and what came before, as everything in a causal model, so both passes run on new
tokens alone where there is a cache (`generation/cache.py`). The scaling pass stops at the last hidden state: no head,
no loss, no list of hidden states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orbit.adapter.errors import ScalingsError
from orbit.adapter.routes.plan import Scaled
from orbit.adapter.routes.replay import in_backward
from orbit.adapter.routes.route import route
from orbit.adapter.routes.state import outside_graphs
from orbit.xlora.classifier import applied
from orbit.xlora.errors import CacheError, XLoRAError
from orbit.xlora.generation.arguments import cache_of
from orbit.xlora.generation.cache import TwinCache
from orbit.xlora.generation.lagging import Lagging
from orbit.xlora.passes.decoder import body_of
from orbit.xlora.passes.shared import sharing

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


@outside_graphs  # routes are switched outside of graphs; compile the model's blocks, which both passes run
def run(
    model: xLoRAModel, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The output of `forward`, the model's own, under the scalings that the classifier predicts."""
    given = dict(kwargs)
    if args:
        given |= inspect.signature(forward).bind_partial(*args).arguments
    cache = cache_of(model, given)
    approximation = model.xlora_approximation
    alone = cache is None and approximation is None
    with sharing(model, given) if alone else nullcontext() as shared:
        prediction = (approximation.predict if approximation else predict)(model, given, cache)
        if not in_backward():  # a checkpoint's replay is no forward of its own
            model.xlora_log.note(prediction)
        if shared is not None:
            shared.replaying = True
        return _main_pass(model, forward, given, prediction, cache)


def _main_pass(
    model: xLoRAModel,
    forward: Callable[..., Any],
    given: dict[str, Any],
    prediction: Tensor,
    cache: TwinCache | None,
) -> Any:
    given["past_key_values" if cache is not None else "use_cache"] = cache if cache is not None else False
    whole = given.pop("logits_to_keep", 0) if _head_mixes(model) else 0
    as_tuple = given.get("return_dict", getattr(model.config, "return_dict", None)) is False
    given["return_dict"] = True
    with _naming_layers(model), route(model, mixture(model, applied(prediction, model.xlora_config))):
        output = forward(**given)
    if isinstance(whole, Tensor) or whole:
        output.logits = output.logits[:, whole if isinstance(whole, Tensor) else slice(-whole, None)]
    return output.to_tuple() if as_tuple else output


def predict(model: xLoRAModel, given: Mapping[str, Any], cache: TwinCache | None) -> Tensor:
    """The prediction (batch, seq, layers, experts) for a forward's arguments.

    Raises:
        CacheError: the cache was filled under an approximation.
    """
    if cache is not None and isinstance(cache.scaling, Lagging):
        if cache.scaling.get_seq_length():
            raise CacheError(
                "past_key_values was filled under xlora.approximate, whose scaling pass is another; start from an "
                "empty cache, or go on under the same approximation"
            )
        cache.scaling = cache.scaling.cache
    memory = model.xlora_memory
    if cache is not None or memory is None:
        hidden = scaling_pass(model, given, None if cache is None else cache.scaling)
    else:
        hidden = memory.hidden(model, _passed(given), lambda: scaling_pass(model, given, None))
    prediction: Tensor = model.xlora_classifier(hidden, model.xlora_config)
    return prediction


def mixture(model: xLoRAModel, scalings: Tensor) -> Scaled:
    """The route of these scalings (batch, seq, layers, experts)."""
    return Scaled(model.xlora_experts, scalings, model.xlora_places(), model.xlora_flat())


def scaling_pass(model: xLoRAModel, given: Mapping[str, Any], cache: Any | None) -> Tensor:
    """The last hidden state (batch, seq, hidden) of the decoder for a forward's arguments, without gradient.

    Args:
        cache: of this pass, which is filled.
    """
    config = model.xlora_config
    value = config.scaling_pass_value * config.global_scaling_weight
    chosen = route(model, tasks=dict.fromkeys(model.xlora_experts, value)) if value else route(model, None)
    with torch.no_grad(), chosen:
        output = body_of(model)(
            **_passed(given),
            use_cache=cache is not None,
            past_key_values=cache,
            return_dict=True,
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _passed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of a forward's arguments, those of the scaling pass."""
    return {key: value for key, value in given.items() if key not in _HEAD_ONLY}


@contextmanager
def _naming_layers(model: xLoRAModel) -> Iterator[None]:
    try:
        yield
    except ScalingsError as error:
        name = next(path for path, layer in model.xlora_layers().items() if layer is error.layer)
        raise XLoRAError(
            f"{name}: {error}; experts of a mixture cannot lie on layers that are given a choice of tokens (a routed "
            f"expert of the model's own): train them with AdapterConfig(exclude=({name!r},))"
        ) from error


def _head_mixes(model: xLoRAModel) -> bool:
    """Does the head carry experts? It then needs the scalings' tokens, all of them."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return id(head) in model.xlora_places()

"""Making a model that carries tasks a mixture of them, in place, and an ordinary model again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from orbit.adapter.errors import RouteError
from orbit.adapter.inject import remove as remove_task
from orbit.adapter.routes.plan import Together
from orbit.adapter.routes.route import set_route, state_of
from orbit.core.runtime import resolve_device
from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.errors import XLoRAError
from orbit.xlora.experts import check_layers, expert_layers
from orbit.xlora.log import ScalingsLog
from orbit.xlora.model import mixture_class, xLoRAModel
from orbit.xlora.passes.decoder import decoder_of, hidden_size


def mix(
    model: nn.Module, experts: Sequence[str], config: xLoRAConfig, classifier: Classifier | None = None
) -> xLoRAModel:
    """Make `model`, which carries the tasks `experts`, a mixture of them, in place.

    Everything but the classifier is frozen, and the experts where they are to train.

    Args:
        classifier: a trained one of these settings; None makes a new one.

    Raises:
        XLoRAError: no experts, another hidden size, more experts to keep than there are, an encoder-decoder, or it is
            a mixture already. The model is unchanged.
    """
    if isinstance(model, xLoRAModel):
        raise XLoRAError(f"{type(model).__name__} is a mixture of {list(model.xlora_experts)} already")
    if not experts:
        raise XLoRAError("a mixture needs at least one expert: adapters={name: folder of a PEFT adapter}")
    if len(set(experts)) < len(experts):
        raise XLoRAError(
            f"experts={list(experts)} names one twice; every expert has one place among the scalings"
        )
    if config.top_k_lora is not None and config.top_k_lora > len(experts):
        raise XLoRAError(
            f"xLoRAConfig(top_k_lora={config.top_k_lora}): there are only {len(experts)} experts"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise XLoRAError(
            f"{type(model).__name__} has an encoder and a decoder, and a mixture is one of a causal language model"
        )
    size = hidden_size(model)
    if config.hidden_size != size:
        raise XLoRAError(
            f"xLoRAConfig(hidden_size={config.hidden_size}): the last hidden state of {type(model).__name__} has "
            f"{size} features"
        )
    state = state_of(model, Together(tuple((expert, 1.0) for expert in experts)))
    unknown = [expert for expert in experts if expert not in state.configs]
    if unknown or state.merged is not None:
        raise XLoRAError(
            f"there is no task {unknown[0]!r} to be an expert; the model has {list(state.configs)}"
            if unknown
            else f"task {state.merged!r} is merged into the weights; unmerge it before mixing"
        )
    check_layers(model, experts, decoder_of(model))
    classifier = new_classifier(model, experts, config) if classifier is None else classifier
    classifier.train(model.training)
    set_route(model, None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cls = type(model)
    model.__class__ = mixture_class(cls)
    assert isinstance(model, xLoRAModel)
    model.xlora_config, model.xlora_experts = replace(config), tuple(experts)
    model.xlora_classifier, model.xlora_log = classifier, ScalingsLog()
    model.set_use_trainable_adapters(config.use_trainable_adapters)
    state.pinned.update(
        dict.fromkeys(experts, f"an expert of the mixture {cls.__name__}; xlora.remove(model) ends it")
    )
    return model


def remove(model: nn.Module, *, keep_experts: bool = False) -> nn.Module:
    """Make a mixture an ordinary model of its own class again, in place; the classifier and the log are gone.

    Args:
        keep_experts: leave the experts in the model as the tasks that they are; else they are removed too.

    Returns:
        The same model. What it froze stays frozen.

    Raises:
        XLoRAError: it is no mixture, or its class was changed since. RouteError: it is running.
    """
    original = type(model).__dict__.get("_xlora_original")
    if original is None:
        raise XLoRAError(
            f"{type(model).__name__} is no mixture"
            + ("; its class was changed since it became one" if isinstance(model, xLoRAModel) else "")
        )
    assert isinstance(model, xLoRAModel)
    state, experts = state_of(model), model.xlora_experts
    if state.busy:
        raise RouteError("the mixture cannot end while a call or a `with route` is running")
    for expert in experts:
        state.pinned.pop(expert, None)
    del model.xlora_classifier
    for name in [name for name in model.__dict__ if name.startswith(("xlora_", "_xlora_"))]:
        del model.__dict__[name]
    model.__class__ = original
    for expert in () if keep_experts else experts:
        remove_task(model, expert)
    return model


def new_classifier(model: nn.Module, experts: Sequence[str], config: xLoRAConfig) -> Classifier:
    """A classifier for a mixture of these tasks of `model`.

    Raises:
        XLoRAError: there is no such device.
    """
    try:
        device = resolve_device(config.device or next(model.parameters()).device)
    except ValueError as error:
        raise XLoRAError(f"xLoRAConfig(device={config.device!r}): {error}") from None
    return Classifier(config, len(expert_layers(model, experts)), len(experts), device=device)

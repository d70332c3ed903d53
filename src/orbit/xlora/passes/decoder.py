"""The parts of a causal language model of transformers that the two passes run."""

from __future__ import annotations

from typing import Any

from torch import nn

from orbit.xlora.errors import XLoRAError


def body_of(model: nn.Module) -> nn.Module:
    """Everything below the head of a causal LM: its decoder, and what puts images or sounds among the tokens."""
    body = getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) and body is not model else decoder_of(model)


def decoder_of(model: nn.Module) -> nn.Module:
    """The part of a causal LM that reads its tokens, below the head.

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


def blocks_of(model: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of the decoder's layers, and the module and name that hold it."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for owner in decoder_of(model).modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return owner, name, child
    raise XLoRAError(f"{type(model).__name__} has no list of its {depth} layers, so none can be left out")


def hidden_size(model: nn.Module) -> int:
    """The features of the last hidden state: what the head takes, else what the config says."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    found = getattr(head, "in_features", None) or getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(found, int):
        raise XLoRAError(
            f"{type(model).__name__} is no causal language model of transformers: it has no hidden_size"
        )
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise XLoRAError(
            f"{type(model).__name__} is no causal language model of transformers, whose caches a mixture makes two of: "
            "its config is another's"
        )
    return found

"""Mixtures whose scalings change what they generate, and generation by two whole passes per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject
from orbit.xlora import mix, xLoRAConfig

EXPERTS = ("facts", "chat", "verse")
VOCABULARY = 96


def llama(**settings: Any) -> nn.Module:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(
        LlamaConfig(**(sizes | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0} | settings))
    ).eval()


def mixed(model: nn.Module, *, targets: Any = None, noise: float = 0.2, **settings: Any) -> Any:
    """`model` as a mixture of three experts and a classifier with large random weights."""
    chosen = {} if targets is None else {"targets": targets}
    for expert in EXPERTS:
        inject(model, AdapterConfig(r=4, alpha=8, **chosen), expert)
    size = model.config.get_text_config().hidden_size
    size = getattr(model.config, "word_embed_proj_dim", size)
    mixture = mix(model, EXPERTS, xLoRAConfig(size, **{"layerwise_scalings": True} | settings))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(noise * torch.randn_like(parameter))
        for parameter in mixture.xlora_classifier.parameters():
            parameter.normal_(std=1.0)
    return mixture


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def by_whole_passes(
    model: Any, ids: Tensor, steps: int, mask: Tensor | None = None, *, bare: bool = False
) -> Tensor:
    """The most likely continuation, with both passes on the whole text for every token and no cache.

    Positions are given where texts are padded; `bare` leaves them to a model that takes none.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(steps):
        given = {} if bare else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, use_cache=False, **given).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids

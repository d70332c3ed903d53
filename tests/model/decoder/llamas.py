"""Tiny models of transformers, and ours of the same weights."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from orbit.model import Transformer, TransformerConfig, load_llama_weights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # else all logits are alike
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def llama(kind: str = "llama", seed: int = 0, **settings):
    """transformers' model, in eval mode."""
    config, model = KINDS[kind]
    torch.manual_seed(seed)
    return model(config(**{**SIZES, **settings})).eval()


def ours(theirs) -> Transformer:
    """Ours with its weights."""
    return load_llama_weights(Transformer(TransformerConfig.from_llama(theirs.config)), theirs).eval()


def prompts(rows: int = 2, length: int = 12, padding: int = 0, vocab: int = 50):
    """Random ids and a mask; the first row has so much padding on the left."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ids[mask == 0] = 0
    return ids, mask

"""A word-level tokenizer and a two-layer Llama made on the spot: real transformers code, no download."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "when did ghana become independent ? 6 march 1957 what is the capital of mali bamako hello"
SPECIAL = ["<unk>", "<end>", "<start>"]
TEMPLATE = (
    "{% for m in messages %}<start> {{ m['role'] }} {{ m['content'] }} <end> \n{% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)


def tiny_tokenizer(template: str | None = TEMPLATE, pad: str | None = "<end>", extra: tuple[str, ...] = ()):
    """Words and the specials <start>, <end> (EOS, and padding too, as in SmolLM2)."""
    words = [
        *SPECIAL,
        *WORDS.split(),
        "system",
        "user",
        "assistant",
        "\n",
        ":",
        "System",
        "User",
        "Assistant",
        *extra,
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token=pad
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(tokenizer, seed: int = 0, hidden: int = 32, dtype=torch.float32) -> LlamaForCausalLM:
    """Two random layers over the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,  # else every greedy reply is one word repeated
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()

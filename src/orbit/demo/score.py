"""What the demo measures: exact match of greedy answers, and perplexity of a text.

Exact match compares the whole reply with the whole answer, after both are stripped of surrounding white space
and of one closing full stop, and case-folded: "Accra." is "accra", "The capital is Accra." is not.

    perplexity = exp(mean of −log p(x_t | x_<t) over all tokens but each block's first)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from orbit.core.modes import evaluating
from orbit.data.template import encode, render
from orbit.evaluate.metrics import normalise
from orbit.evaluate.passes import greedy_replies
from orbit.objective.causal_lm import CausalLM


def exact_match(replies: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of replies, in [0, 1], that are the wanted answer and nothing else."""
    hits = [normalise(reply) == normalise(answer) for reply, answer in zip(replies, wanted, strict=True)]
    return sum(hits) / len(hits)


def contains(reply: str, answer: str) -> bool:
    """The answer occurs somewhere in the reply."""
    return normalise(answer) in normalise(reply)


def answers(
    model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int = 12, batch_size: int = 128
) -> list[str]:
    """Greedy replies to single questions under the chat template, generated in left-padded batches.

    Args:
        model: a transformers causal LM; it answers as its current adapter has it.
        max_new_tokens: replies are cut here.
    """
    prompts = [
        encode(tokenizer, render(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True))
        for q in questions
    ]
    replies: list[str] = []
    with evaluating(model), torch.inference_mode():
        for i in range(0, len(prompts), batch_size):
            replies += greedy_replies(model, tokenizer, prompts[i : i + batch_size], max_new_tokens)
    return replies


def perplexity(model: Any, tokenizer: Any, text: str, block: int = 512) -> float:
    """Perplexity of a text, read in blocks of at most `block` tokens and of the model's context length."""
    block = min(block, getattr(model.config, "max_position_embeddings", block))
    ids = torch.tensor(encode(tokenizer, text), device=next(model.parameters()).device)
    total = weight = 0.0
    with evaluating(model), torch.inference_mode():
        for part in ids.split(block):
            row = part[None]
            batch = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
            outcome = CausalLM()(model, batch)
            assert outcome.loss is not None
            total += float(outcome.loss) * float(outcome.weight)
            weight += float(outcome.weight)
    return math.exp(total / weight)

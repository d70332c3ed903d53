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

from orbit.chat.head import contiguous_head
from orbit.data.sft import pad_token_id
from orbit.data.template import encode, render
from orbit.evaluate.metrics import normalise
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
    device, training = next(model.parameters()).device, model.training
    prompts = [
        encode(tokenizer, render(tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True))
        for q in questions
    ]
    pad, replies = pad_token_id(tokenizer), []
    model.eval()
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        longest = max(map(len, some))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in some], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=device)
        with torch.inference_mode(), contiguous_head(model):
            made = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )
        replies += tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    model.train(training)
    return [reply.strip() for reply in replies]


def perplexity(model: Any, tokenizer: Any, text: str, block: int = 512) -> float:
    """Perplexity of a text, read in blocks of at most `block` tokens and of the model's context length."""
    block = min(block, getattr(model.config, "max_position_embeddings", block))
    device, training = next(model.parameters()).device, model.training
    ids = torch.tensor(encode(tokenizer, text), device=device)
    total = weight = 0.0
    model.eval()
    for part in ids.split(block):
        batch = {"input_ids": part[None], "attention_mask": torch.ones_like(part[None]), "labels": part[None]}
        with torch.inference_mode():
            outcome = CausalLM()(model, batch)
        assert outcome.loss is not None
        total += float(outcome.loss) * float(outcome.weight)
        weight += float(outcome.weight)
    model.train(training)
    return math.exp(total / weight)

"""Samples for supervised fine-tuning: `build_sft` (document 000's helper).

    input_ids   <system>… <user> When did Ghana become independent? <assistant>  6 March 1957 <end>
    labels       -100  …   -100                                      -100        6 March 1957 <end>

The model's words and the mark that ends its turn are supervised, also where that mark is the padding token
(masking by `ids == pad`, as Orbit 0.1 did, teaches a model never to stop). Everything else is `ignore_index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from orbit.data.template import Message, encode_turns

Pair = tuple[str, str]


class MaskedSampleError(ValueError):
    """A sample without a single supervised token: it could teach nothing, and its loss would be empty."""


def build_sft(
    user_content: str | Sequence[Message] | Sequence[Pair],
    model_content: str | None = None,
    tokenizer: Any = None,
    max_length: int = 2048,
    model_role: str = "assistant",
    padding: bool = False,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """One training sample from a question and its answer, or from a whole conversation.

    Args:
        user_content: the question; or, with no `model_content`, a conversation as messages
            [{"role": "user", "content": ...}, ...] or as pairs [(question, answer), ...].
        model_content: the answer.
        tokenizer: a Hugging Face tokenizer; its chat template is used, else `orbit.data.template.FALLBACK`.
        max_length: longer samples lose their end.
        model_role: the role whose turns are supervised.
        padding: pad to `max_length` on the right. Leave it off with `SFTCollator`, which pads to the batch.
        ignore_index: label of what is not supervised.

    Returns:
        {"input_ids", "attention_mask", "labels"}, each (length,) int64, unshifted.

    Raises:
        TypeError: no tokenizer, or content of another form.
        MaskedSampleError: no token is supervised: an empty answer, no turn of `model_role`, or a prompt that
            fills `max_length`.
        TemplateError: the chat template does not let answer and prompt be told apart.

    >>> sample = build_sft("When did Ghana become independent?", "6 March 1957", tokenizer)   # doctest: +SKIP
    >>> tokenizer.decode(sample["labels"][sample["labels"] != -100])                          # doctest: +SKIP
    '6 March 1957<|im_end|>'
    """
    if tokenizer is None:
        raise TypeError("build_sft needs a tokenizer: build_sft(question, answer, tokenizer)")
    messages = _messages(user_content, model_content, model_role)
    ids, said = encode_turns(tokenizer, messages, model_role)
    if not any(m["role"] == model_role and m["content"].strip() for m in messages):
        said = []
    labels = [ignore_index] * len(ids)
    for start, stop in said:
        labels[start:stop] = ids[start:stop]
    length, ids, labels = len(ids), ids[:max_length], labels[:max_length]
    if all(label == ignore_index for label in labels):
        raise MaskedSampleError(_why_masked(tokenizer, messages, model_role, length, max_length, ids))
    mask = [1] * len(ids)
    if padding:
        missing = max_length - len(ids)
        ids = ids + [pad_token_id(tokenizer)] * missing
        labels, mask = labels + [ignore_index] * missing, mask + [0] * missing
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "attention_mask": torch.tensor(mask, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def pad_token_id(tokenizer: Any) -> int:
    """What to fill padding with: the padding token, else EOS, else 0; the attention mask hides it."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None)


def _messages(user: Any, model: str | None, model_role: str) -> list[Message]:
    messages = _conversation(user, model, model_role)
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            raise TypeError(f"build_sft takes text, but the content of message {i} is {message['content']!r}")
    return messages


def _conversation(user: Any, model: str | None, model_role: str) -> list[Message]:
    if isinstance(user, str) and isinstance(model, str):
        return [{"role": "user", "content": user}, {"role": model_role, "content": model}]
    if isinstance(user, Sequence) and not isinstance(user, str) and model is None:
        if user and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in user):
            return list(user)
        if user and all(isinstance(p, Sequence) and not isinstance(p, str) and len(p) == 2 for p in user):
            turns = [({"role": "user", "content": q}, {"role": model_role, "content": a}) for q, a in user]
            return [message for turn in turns for message in turn]
    raise TypeError(
        f"build_sft got user_content={user!r} and model_content={model!r}: give a question and its answer, "
        "or only a list of {'role', 'content'} messages, or only a list of (question, answer) pairs"
    )


def _why_masked(
    tokenizer: Any, messages: list[Message], role: str, length: int, max_length: int, ids: list[int]
) -> str:
    said = [m["content"] for m in messages if m["role"] == role]
    if not said:
        roles = sorted({m["role"] for m in messages})
        why = f"no message has the model's role {role!r} (roles: {roles}); pass model_role="
    elif not any(content.strip() for content in said):
        why = "the answer is empty"
    else:
        why = f"the prompt fills max_length={max_length} of {length} tokens; raise max_length or shorten it"
    shown = f"{tokenizer.decode(ids)!r} from {messages!r}"
    return f"every label of this sample is masked: {why}. The sample: {shown}"

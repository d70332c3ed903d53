"""Text from a causal language model, a token at a time: `generate`.

The prompt passes the model once and fills the cache; then every token costs one token. Prompts of unequal length are
padded on the left, so that all rows go on at the same column; a row's text does not depend on the others.

    B prompts, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orbit.core.modes import evaluating
from orbit.model.decoder.sampling import Sampling
from orbit.model.errors import MaskError, SettingError, ShapeError
from orbit.model.mask import positions_from_mask

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    stopping_criteria: Sequence[Callable[[Tensor, Any], Tensor]] = (),
) -> Tensor:
    """Go on with the prompts until each has ended: (B, S + new), prompts included.

    Equal to transformers' `generate` on the same weights, drawn tokens too if both are told `top_k`: transformers takes
    50 where nothing is said, and here nothing is hidden. It ends at `max_new_tokens`, or where the text reaches the
    model's `max_length`.

    Args:
        model: a `Transformer`; it is in eval mode meanwhile.
        input_ids: (B, S) prompts.
        attention_mask: (B, S), 0 where a prompt is padded, on the left.
        max_new_tokens: the most tokens.
        do_sample: draw tokens; default: if a temperature, top_k or top_p is given.
        temperature: logits are divided by it.
        top_k: draw from the k likeliest; default: from all.
        top_p: draw from the fewest tokens that together have this probability.
        repetition_penalty: above 1, tokens that are in a row's prompt or text become less likely.
        eos_token_id: ends a row, one or several; default: the config's.
        pad_token_id: fills rows that have ended; default: the config's, else the first that ends a row.
        generator: tokens are drawn from it; default: torch's own.
        streamer: `put(ids)` gets the prompt and then every new token, `end()` the end; on the CPU.
        stopping_criteria: called with (ids, logits) after every token; each says which rows have ended (B,).

    Raises:
        ShapeError: no prompt, or one that fills the model's `max_length`.
        MaskError: padding anywhere but on the left, or a prompt of padding alone.
        SettingError: a value outside its range, or one that would do nothing.

    >>> model.generate(ids, max_new_tokens=20, temperature=0.7, top_p=0.9)     # doctest: +SKIP
    """
    draws = do_sample if do_sample is not None else any(v is not None for v in (temperature, top_k, top_p))
    sampling = Sampling(draws, temperature, top_k, top_p, repetition_penalty)
    ends = _ends(model, eos_token_id)
    pad = next((p for p in (pad_token_id, model.config.pad_token_id, *ends[:1].tolist()) if p is not None), 0)
    if not 0 <= pad < model.config.vocab_size:
        raise SettingError(
            f"pad_token_id {pad} is no token: rows that have ended are filled with one of the {model.config.vocab_size}"
        )
    count = _room(model, input_ids, max_new_tokens)
    ids, real = input_ids, _checked_mask(input_ids, attention_mask)
    positions = None if real is None else positions_from_mask(real)
    cache, new = model.make_cache(), ids
    ends = ends.to(ids.device)
    is_open = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
    if streamer is not None:
        streamer.put(ids.cpu())
    with evaluating(model):
        for _ in range(count):
            output = model(new, attention_mask=real, cache=cache, positions=positions, logits_to_keep=1)
            logits = output.logits[:, -1]
            token = sampling.choose(logits, ids, real, generator)
            token = torch.where(is_open, token, pad)
            new = token[:, None]
            ids = torch.cat((ids, new), 1)
            if real is not None and positions is not None:
                real = torch.cat((real, torch.ones_like(new, dtype=torch.bool)), 1)
                positions = positions[:, -1:] + 1
            if streamer is not None:
                streamer.put(token.cpu())
            is_open = is_open & ~torch.isin(token, ends)
            for criterion in stopping_criteria:
                is_open = is_open & ~criterion(ids, logits)
            if not is_open.any():
                break
    if streamer is not None:
        streamer.end()
    return ids


def _ends(model: Any, given: int | Sequence[int] | None) -> Tensor:
    ids = (
        model.config.eos_token_ids if given is None else (given,) if isinstance(given, int) else tuple(given)
    )
    return torch.tensor(ids, dtype=torch.long)


def _room(model: Any, input_ids: Tensor, max_new_tokens: int) -> int:
    """How many tokens may come."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ShapeError(
            f"prompts of shape {tuple(input_ids.shape)}: (B, S) with at least one token each are needed"
        )
    if max_new_tokens < 1:
        raise SettingError(f"max_new_tokens {max_new_tokens} makes nothing: choose 1 or more")
    limit = model.config.max_length
    if limit is None:
        return max_new_tokens
    if input_ids.shape[1] >= limit:
        raise ShapeError(
            f"a prompt of {input_ids.shape[1]} tokens leaves no room in the model's max_length {limit}: shorten it"
        )
    return min(max_new_tokens, limit - input_ids.shape[1])


def _checked_mask(input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Which tokens of the prompts are real, (B, S), or None if all are."""
    if mask is None:
        return None
    if mask.shape != input_ids.shape or mask.is_floating_point():
        raise MaskError(
            f"attention_mask of shape {tuple(mask.shape)} and {mask.dtype}: 1 for tokens and 0 for padding, "
            f"{tuple(input_ids.shape)} like the prompts, is needed"
        )
    real = mask != 0
    if real.all():
        return None
    if not real[:, -1].all() or (real[:, 1:] < real[:, :-1]).any():
        raise MaskError(
            "prompts are padded on the left, so that every row goes on at the last column: padding_side='left'"
        )
    return real

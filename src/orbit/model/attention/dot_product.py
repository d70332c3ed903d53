"""Scaled dot-product attention over grouped heads: torch's fused kernels, and the same with its weights in sight.

    y_h = softmax(q_h k_gᵀ / √D + mask) v_g,   g = h·G/H

    q (B, H, T, D), k and v (B, G, S, D), mask (B, H, T, S) or what broadcasts to it, bool, True = attend.

A query that may see nothing gives zeros. With causal=True the queries are the last T of the S positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from orbit.model.mask import make_causal_mask, make_sliding_window_mask


def attend(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """(B, H, T, D) by `scaled_dot_product_attention`, with a mask only where its flags cannot say the same."""
    batch, heads, queries, width = q_BHTD.shape
    groups, keys = k_BGSD.shape[1:3]
    # torch counts `is_causal` from the first key, so it is right for a square alone, and it excludes a mask.
    if causal and mask is None and 1 < queries == keys and (window is None or keys <= window):
        square = True  # said by a branch: while compiling, the comparison itself is no plain bool
    else:
        square = False
        mask = visible(queries, keys, mask, causal, window, q_BHTD.device)
    grouped = False
    if heads != groups:
        if queries == 1:  # one query: the heads of a group stand in line as its queries
            if mask is not None and mask.shape[1] != 1:
                mask = mask.reshape(mask.shape[0], groups, heads // groups, keys)
            line = q_BHTD.reshape(batch, groups, heads // groups, width)
            return F.scaled_dot_product_attention(line, k_BGSD, v_BGSD, mask, dropout).reshape(q_BHTD.shape)
        grouped = _takes_groups(q_BHTD, mask)
        if not grouped:
            k_BGSD, v_BGSD = _repeated(k_BGSD, heads // groups), _repeated(v_BGSD, heads // groups)
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, mask, dropout, is_causal=square, enable_gqa=grouped
    )


def attend_with_weights(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What `attend` gives, and the weights (B, H, T, S) before dropout: softmax in float32 at least."""
    queries, keys, repeats = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1] // k_BGSD.shape[1]
    mask = visible(queries, keys, mask, causal, window, q_BHTD.device)
    k_BHSD, v_BHSD = _repeated(k_BGSD, repeats), _repeated(v_BGSD, repeats)
    scores = q_BHTD @ k_BHSD.transpose(-1, -2) / math.sqrt(q_BHTD.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    weights = weights.to(v_BHSD.dtype)
    return F.dropout(weights, dropout) @ v_BHSD, weights


def visible(
    queries: int, keys: int, mask: Tensor | None, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """The caller's mask joined with the causal and the sliding-window one; None where all is seen."""
    own = None
    if window is not None and keys > window:
        own = make_sliding_window_mask(queries, window, keys, causal=causal, device=device)
    elif causal and queries > 1:
        own = make_causal_mask(queries, keys, device=device)
    return own if mask is None else mask if own is None else mask & own


def _takes_groups(q_BHTD: Tensor, mask: Tensor | None) -> bool:
    """Where torch has a kernel for grouped heads; elsewhere `enable_gqa` falls back to storing all scores."""
    half = q_BHTD.dtype in (torch.float16, torch.bfloat16)
    return q_BHTD.device.type == "cpu" or (half and mask is None and q_BHTD.shape[-1] <= 256)


def _repeated(x_BGSD: Tensor, repeats: int) -> Tensor:
    return x_BGSD if repeats == 1 else x_BGSD.repeat_interleave(repeats, 1)

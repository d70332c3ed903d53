"""Attention masks: boolean, True = attend, as `scaled_dot_product_attention` takes them.

Every mask has four dimensions that broadcast to (B, H, T, S), so that masks combine by `&` and go as they are into
torch's function and into `MultiHeadAttention`:

    causal            (1, 1, T, S)   j ≤ i
    lookahead         (1, 1, T, S)   j ≤ i + lookahead
    sliding window    (1, 1, T, S)   i − window < j ≤ i, or |i − j| < window
    padding           (B, 1, 1, S)   key j of row b is a real token

    B batch, H heads, T queries, S keys; i and j are positions in the sequence.

With more keys than queries (new tokens over a cache) the queries are the last T positions: i = S − T + t. torch's
own `is_causal=True` counts from the first key instead, which lets one new query see nothing but key 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orbit.model.errors import MaskError

__all__ = [
    "make_causal_mask",
    "make_lookahead_mask",
    "make_padding_mask",
    "make_sliding_window_mask",
    "positions_from_mask",
]


def make_causal_mask(
    queries: int, keys: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Each query sees itself and what came before: (1, 1, queries, keys), keys = queries unless given.

    >>> make_causal_mask(2, 4).int()[0, 0]
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)

    Raises:
        MaskError: fewer keys than queries, or no query.
    """
    return _ahead(queries, keys, device) <= 0


def make_lookahead_mask(
    queries: int, lookahead: int = 0, keys: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Each query sees what came before and at most `lookahead` positions ahead: (1, 1, queries, keys).

    0 is the causal mask; more is what streaming models with a bounded delay use.

    >>> make_lookahead_mask(3, 1).int()[0, 0]
    tensor([[1, 1, 0],
            [1, 1, 1],
            [1, 1, 1]], dtype=torch.int32)

    Raises:
        MaskError: a negative lookahead, fewer keys than queries, or no query.
    """
    if lookahead < 0:
        raise MaskError(f"lookahead {lookahead} hides a query from itself: choose 0 (causal) or more")
    return _ahead(queries, keys, device) <= lookahead


def make_sliding_window_mask(
    queries: int,
    window: int,
    keys: int | None = None,
    *,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Each query sees `window` positions, itself the last of them: (1, 1, queries, keys).

    With `causal=False` it sees as far ahead as back: |i − j| < window. The window counts as Mistral's does.

    >>> make_sliding_window_mask(4, 2).int()[0, 0]
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)

    Raises:
        MaskError: a window below 1, fewer keys than queries, or no query.
    """
    if window < 1:
        raise MaskError(f"window {window} leaves a query nothing to see: choose 1 (itself) or more")
    ahead = _ahead(queries, keys, device)
    return (ahead > -window) & (ahead < (1 if causal else window))


def make_padding_mask(
    tokens_or_lengths: Tensor,
    *,
    pad_id: int | None = None,
    max_length: int | None = None,
    side: str = "right",
) -> Tensor:
    """Real tokens are seen, padding is not: (B, 1, 1, S).

    Give token ids (B, S) with `pad_id`, or lengths (B,) with the padded length `max_length` and the `side` that the
    padding is on. Where padding shares its id with a real token (often the end of text), ids cannot tell
    them apart: give lengths.

    >>> make_padding_mask(torch.tensor([[5, 7, 0], [5, 0, 0]]), pad_id=0).int()[:, 0, 0]
    tensor([[1, 1, 0],
            [1, 0, 0]], dtype=torch.int32)
    >>> make_padding_mask(torch.tensor([2, 1]), max_length=3, side="left").int()[:, 0, 0]
    tensor([[0, 1, 1],
            [0, 0, 1]], dtype=torch.int32)

    Raises:
        MaskError: neither form, or arguments of the other one.
    """
    given = tokens_or_lengths
    if given.is_floating_point() or given.dtype == torch.bool:
        raise MaskError(
            f"token ids or lengths are integers, not {given.dtype}; a boolean mask (B, S) needs no conversion"
        )
    if given.dim() == 2:
        if pad_id is None or max_length is not None:
            raise MaskError("token ids (B, S) need pad_id= and no max_length=")
        real_BS = given != pad_id
    elif given.dim() == 1:
        if max_length is None or pad_id is not None:
            raise MaskError("lengths (B,) need max_length= and no pad_id=")
        if side not in ("left", "right"):
            raise MaskError(f"side {side!r} is unknown: 'left' or 'right'")
        column_S = torch.arange(max_length, device=given.device)
        real_BS = (column_S if side == "right" else max_length - 1 - column_S) < given[:, None]
    else:
        raise MaskError(
            f"shape {tuple(given.shape)} is neither token ids (B, S) with pad_id= nor lengths (B,) with max_length="
        )
    return real_BS[:, None, None, :]


def make_packed_mask(positions_BT: Tensor) -> Tensor:
    """Texts in one row see themselves alone: (B, 1, T, T). One begins where the positions do not rise by one.

    >>> make_packed_mask(torch.tensor([[0, 1, 0]])).int()[0, 0]
    tensor([[1, 1, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    text_BT = (positions_BT.diff(dim=1, prepend=positions_BT[:, :1]) != 1).cumsum(1)
    return (text_BT[:, :, None] == text_BT[:, None, :])[:, None]


def positions_from_mask(mask_BS: Tensor) -> Tensor:
    """The position of every real token in its row, counted from 0 at the first one: (B, S), padding at 0.

    So a left-padded row has the positions that it would have alone. For new tokens over a cache take the last columns.

    >>> positions_from_mask(torch.tensor([[False, False, True, True], [True, True, True, True]]))
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 3]])

    Raises:
        MaskError: the mask is not boolean of shape (B, S).
    """
    if mask_BS.dtype != torch.bool or mask_BS.dim() != 2:
        raise MaskError(
            "positions come from a boolean mask (B, S), True = real token, "
            f"not {tuple(mask_BS.shape)} of {mask_BS.dtype}"
        )
    return (mask_BS.long().cumsum(-1) - 1).clamp(min=0) * mask_BS


def fit_mask(mask: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """A caller's mask with its four dimensions, those of size 1 left as they are.

    (B, S) is for keys, (B, T, S) and (B, H, T, S) are per query. Two dimensions never mean (T, S): with as many rows
    as queries nobody could tell.

    Raises:
        MaskError: the mask is not boolean or does not fit.
    """
    if mask.dtype != torch.bool:
        raise MaskError(
            f"a mask is boolean, True = attend, not {mask.dtype}: mask.bool() makes one of 0 and 1, "
            "mask == 0 one of 0 and -inf"
        )
    full = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    sizes = (batch, heads, queries, keys)
    if (
        full.dim() != 4
        or full.shape[3] != keys
        or any(n not in (1, s) for n, s in zip(full.shape, sizes, strict=True))
    ):
        raise MaskError(
            f"mask of shape {tuple(mask.shape)} does not fit B={batch}, H={heads}, T={queries}, S={keys} "
            f"(cached keys count): (B, S) for keys, (B, T, S) or (B, H, T, S) per query; a (T, S) mask is mask[None]"
        )
    return full


def _ahead(queries: int, keys: int | None, device: torch.device | str | None) -> Tensor:
    """j − i for every query and key: (1, 1, queries, keys)."""
    keys = queries if keys is None else keys
    if not 1 <= queries <= keys:
        raise MaskError(
            f"{queries} queries over {keys} keys: queries are the last of the keys' positions, so 1 ≤ queries ≤ keys"
        )
    i_T = torch.arange(keys - queries, keys, device=device)
    j_S = torch.arange(keys, device=device)
    return (j_S - i_T[:, None])[None, None]

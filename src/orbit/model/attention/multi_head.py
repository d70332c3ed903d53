"""Multi-head attention: every query takes a weighted mean of the values it may see.

    y = W_o · concat_h( softmax(q_h k_gᵀ / √D + mask) v_g ),   g = h·G/H

    B batch, T queries, S keys, H heads, G key/value heads (G = H: multi-head, 1 < G < H: grouped, G = 1: multi-query),
    D dimensions of a head. x (B, T, hidden) → q (B, H, T, D), k and v (B, G, S, D) → y (B, T, hidden).

Optional, in the order in which they act: RMS norm of every head's q and k (Qwen3), rotary positions, a cache of the
past, a causal and a sliding-window mask, the caller's mask, dropout of the weights, a sigmoid gate on the heads' output
(https://arxiv.org/abs/2505.06708). A query that may see nothing gives zeros before `o_proj`, not NaN.

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouped: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orbit.model.attention.cache import KVCache
from orbit.model.attention.checks import check_inputs, check_positions, choose_head_dim
from orbit.model.attention.dot_product import attend, attend_with_weights
from orbit.model.attention.rope import RotaryPositionalEmbedding, Rotation, rotate
from orbit.model.errors import SettingError
from orbit.model.mask import fit_mask

__all__ = ["MultiHeadAttention"]


class MultiHeadAttention(nn.Module):
    """Self- or cross-attention with Llama's parameter names: q_proj, k_proj, v_proj, o_proj.

    Args:
        hidden_size: width of the input and output.
        num_heads: H.
        num_kv_heads: G, a divisor of H; H unless given.
        head_dim: D; hidden_size / num_heads unless given.
        causal: a query sees itself and what came before.
        window: a query sees so many positions, itself the last of them (`make_sliding_window_mask`).
        rope: turns q and k by their positions; one module may serve all layers.
        qk_norm: RMS norm over D of q and k, before the rotation (q_norm, k_norm).
        output_gate: y = W_o (sigmoid(W_g x) ∘ heads) (gate_proj).
        bias: the projections have one.
        dropout: of the attention weights, in training.
        context_size: width of the context; makes this cross-attention, whose keys and values come from it.

    >>> attention = MultiHeadAttention(64, num_heads=4, num_kv_heads=2, causal=True, rope=RotaryPositionalEmbedding(16))
    >>> x = torch.randn(2, 10, 64)
    >>> attention(x).shape
    torch.Size([2, 10, 64])
    >>> cache = attention.make_cache()
    >>> token_by_token = [attention(x[:, t : t + 1], cache=cache) for t in range(10)]
    >>> torch.allclose(torch.cat(token_by_token, 1), attention(x), atol=1e-5)
    True

    Raises:
        SettingError: sizes that do not divide, or settings that exclude each other.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        rope: RotaryPositionalEmbedding | None = None,
        qk_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        context_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = choose_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        if window is not None and window < 1:
            raise SettingError(f"window {window} leaves a query nothing to see: choose 1 (itself) or more")
        if context_size is not None and context_size < 1:
            raise SettingError(f"context_size {context_size} is below 1: leave it out for self-attention")
        if not 0 <= dropout < 1:
            raise SettingError(f"dropout {dropout} is no probability below 1")
        if rope is not None and rope.head_dim != head_dim:
            raise SettingError(
                f"rope turns heads of {rope.head_dim}, these have {head_dim}: RotaryPositionalEmbedding({head_dim})"
            )
        if context_size is not None and (causal or window is not None or rope is not None):
            raise SettingError(
                "a context has no order with the queries: causal, window and rope need context_size=None"
            )
        self.hidden_size, self.context_size = hidden_size, context_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.causal, self.window, self.dropout = causal, window, dropout
        source = hidden_size if context_size is None else context_size
        heads, kv_heads = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, heads, bias, device, dtype)
        self.k_proj = nn.Linear(source, kv_heads, bias, device, dtype)
        self.v_proj = nn.Linear(source, kv_heads, bias, device, dtype)
        self.o_proj = nn.Linear(heads, hidden_size, bias, device, dtype)
        self.gate_proj = nn.Linear(hidden_size, heads, bias, device, dtype) if output_gate else None
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.rope = rope

    def make_cache(self, max_length: int | None = None) -> KVCache:
        """An empty cache for this layer: grows, or holds `max_length` tokens."""
        return KVCache(max_length, window=self.window)

    def forward(
        self,
        x_BTD: Tensor,
        context_BSC: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        rotation: Rotation | None = None,
        positions: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y (B, T, hidden), with `need_weights` also the weights (B, H, T, S) before dropout, S as the
        cache holds them.

        Args:
            x_BTD: queries, and without a context also keys and values.
            context_BSC: keys and values. With `context_size` and a filled cache it may be left out.
            mask: bool, True = attend: (B, S) hides keys (padding) from everyone, (B, T, S) or (B, 1 or H, T, S) says
                it per query; B and T may be 1. S counts all tokens seen, those of the cache first. Joins `causal`
                and `window`.
            cache: the past; new keys and values are added to it. Cross-attention keeps the context's there.
            rotation: `rope(positions)`, made once for all layers of a model.
            positions: (T,) or (B, T), for `rope`; unless given they follow the cache's length. Left padding needs
                none, since scores depend on distances alone.

        Raises:
            ShapeError: x or context of another width.
            MaskError: a mask that is not boolean or does not fit.
            CacheError: a cache that belongs elsewhere; it stays as it was.
            SettingError: arguments that this block cannot use.
        """
        check_inputs(self, x_BTD, context_BSC, cache)
        if rotation is not None or positions is not None:
            check_positions(self, x_BTD, context_BSC, rotation, positions)
        queries, past = x_BTD.shape[1], 0 if cache is None else cache.length
        recalled = self.context_size is not None and context_BSC is None  # the cache holds the context
        if mask is not None:
            keys = past if recalled else past + queries if context_BSC is None else context_BSC.shape[1]
            mask = fit_mask(mask, x_BTD.shape[0], self.num_heads, queries, keys)

        q_BHTD = self._heads(self.q_proj(x_BTD), self.q_norm)
        if recalled and cache is not None:
            k_BGSD, v_BGSD = cache.held()
        else:
            source_BSC = x_BTD if context_BSC is None else context_BSC
            k_BGSD = self._heads(self.k_proj(source_BSC), self.k_norm)
            v_BGSD = self._heads(self.v_proj(source_BSC))
            if rotation is None and self.rope is not None:
                if positions is None:
                    positions = torch.arange(past, past + queries, device=x_BTD.device)
                rotation = self.rope(positions, q_BHTD.dtype)
            if rotation is not None:
                q_BHTD, k_BGSD = rotate(q_BHTD, rotation), rotate(k_BGSD, rotation)
            if cache is not None:
                k_BGSD, v_BGSD = cache.append(k_BGSD, v_BGSD)
                if mask is not None:
                    mask = mask[..., -k_BGSD.shape[2] :]  # a window holds the last keys alone

        inputs = q_BHTD, k_BGSD, v_BGSD, mask
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            heads_BHTD, weights = attend_with_weights(
                *inputs, causal=self.causal, window=self.window, dropout=dropout
            )
        else:
            heads_BHTD = attend(*inputs, causal=self.causal, window=self.window, dropout=dropout)
        y_BTD = heads_BHTD.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            y_BTD = y_BTD * torch.sigmoid(self.gate_proj(x_BTD))
        y_BTD = self.o_proj(y_BTD)
        return (y_BTD, weights) if need_weights else y_BTD

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window={self.window}, dropout={self.dropout}"
        )

    def _heads(self, x_BTW: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """(B, T, heads·D) → (B, heads, T, D), each head normed."""
        batch, tokens, width = x_BTW.shape
        x_BTHD = x_BTW.reshape(batch, tokens, width // self.head_dim, self.head_dim)
        if norm is not None:
            x_BTHD = norm(x_BTHD.to(norm.weight.dtype)).to(x_BTW.dtype)  # under autocast they differ
        return x_BTHD.transpose(1, 2)

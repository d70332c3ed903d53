"""What `MultiHeadAttention` refuses, apart from its mathematics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from orbit.model.attention.cache import KVCache
from orbit.model.attention.rope import Rotation
from orbit.model.errors import CacheError, SettingError, ShapeError

if TYPE_CHECKING:
    from orbit.model.attention.multi_head import MultiHeadAttention


def choose_head_dim(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """The given width of a head, or hidden_size / num_heads; heads must divide evenly."""
    for name, value in (
        ("hidden_size", hidden_size),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
    ):
        if value < 1:
            raise SettingError(f"{name} {value} is below 1")
    if num_heads % num_kv_heads:
        fits = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise SettingError(
            f"num_heads {num_heads} is no multiple of num_kv_heads {num_kv_heads}: choose one of {fits}"
        )
    if head_dim is None:
        if hidden_size % num_heads:
            below = hidden_size // num_heads * num_heads
            fits = " or ".join(str(n) for n in (below, below + num_heads) if n)
            raise SettingError(
                f"hidden_size {hidden_size} is no multiple of num_heads {num_heads}: choose {fits}, or give head_dim="
            )
        return hidden_size // num_heads
    if head_dim < 1:
        raise SettingError(f"head_dim {head_dim} is below 1")
    return head_dim


def check_inputs(
    layer: MultiHeadAttention, x_BTD: Tensor, context_BSC: Tensor | None, cache: KVCache | None
) -> None:
    """Input, context and cache belong to this layer and to each other."""
    if x_BTD.dim() != 3 or x_BTD.shape[-1] != layer.hidden_size:
        raise ShapeError(f"input of shape {tuple(x_BTD.shape)}: (B, T, {layer.hidden_size}) is needed")
    if context_BSC is not None:
        _check_context(layer, x_BTD, context_BSC)
    if cache is not None:
        _check_cache(layer, x_BTD, context_BSC, cache)
    elif layer.context_size is not None and context_BSC is None:
        raise ShapeError("cross-attention needs a context, or a cache that holds one")


def _check_context(layer: MultiHeadAttention, x_BTD: Tensor, context_BSC: Tensor) -> None:
    if layer.causal or layer.window is not None or layer.rope is not None:
        raise SettingError(
            "a context has no order with the queries: leave it out, or build without causal, window and rope"
        )
    width = layer.hidden_size if layer.context_size is None else layer.context_size
    if context_BSC.dim() != 3 or context_BSC.shape[-1] != width or context_BSC.shape[0] != x_BTD.shape[0]:
        raise ShapeError(
            f"context of shape {tuple(context_BSC.shape)}: ({x_BTD.shape[0]}, S, {width}) is needed for input "
            f"{tuple(x_BTD.shape)}"
        )


def _check_cache(
    layer: MultiHeadAttention, x_BTD: Tensor, context_BSC: Tensor | None, cache: KVCache
) -> None:
    if layer.context_size is not None:
        if context_BSC is not None:
            cache.check_recomputation()
        if (context_BSC is None) == (cache.length == 0):
            raise CacheError(
                "cross-attention fills its cache from the context once: give the context with an empty cache, "
                f"then the cache alone (this one holds {cache.length} keys)"
            )
        if context_BSC is None:
            held = cache.held()[0].shape
            if (held[0], held[1], held[3]) != (x_BTD.shape[0], layer.num_kv_heads, layer.head_dim):
                raise CacheError(
                    f"the cache holds {tuple(held)}, (B, G, S, D), and input {tuple(x_BTD.shape)} needs "
                    f"({x_BTD.shape[0]}, {layer.num_kv_heads}, S, {layer.head_dim}): another layer or batch filled it"
                )
    elif context_BSC is not None:
        raise CacheError("a context goes into a cache only if it has its own size: build with context_size=")
    elif not layer.causal:
        raise CacheError("old tokens have not seen the new ones: a cache needs causal=True")
    if cache.window != layer.window:
        raise CacheError(
            f"the cache keeps a window of {cache.window}, this layer sees {layer.window} (None: everything): "
            "make it with attention.make_cache()"
        )


def check_positions(
    layer: MultiHeadAttention,
    x_BTD: Tensor,
    context_BSC: Tensor | None,
    rotation: Rotation | None,
    positions: Tensor | None,
) -> None:
    """A rotation or positions, where this layer can use them."""
    if rotation is not None:
        if positions is not None:
            raise SettingError("a rotation holds its positions already: give one of the two")
        if layer.context_size is not None or context_BSC is not None:
            raise SettingError("a context has no order with the queries: no rotation")
    elif layer.rope is None:
        raise SettingError("positions need a rope: build with rope=RotaryPositionalEmbedding(...)")
    elif positions is not None and tuple(positions.shape) not in (x_BTD.shape[1:2], x_BTD.shape[:2]):
        raise ShapeError(
            f"positions of shape {tuple(positions.shape)} do not fit input {tuple(x_BTD.shape)}: (T,) or (B, T)"
        )

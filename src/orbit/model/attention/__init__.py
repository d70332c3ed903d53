"""Attention and what it is made of: positions, cache, the block."""

from orbit.model.attention.cache import KVCache
from orbit.model.attention.dot_product import attend, attend_with_weights
from orbit.model.attention.multi_head import MultiHeadAttention
from orbit.model.attention.rope import RotaryPositionalEmbedding, Rotation, rotate
from orbit.model.attention.sinusoidal import SinusoidalPositionalEmbedding

__all__ = [
    "KVCache",
    "MultiHeadAttention",
    "RotaryPositionalEmbedding",
    "Rotation",
    "SinusoidalPositionalEmbedding",
    "attend",
    "attend_with_weights",
    "rotate",
]

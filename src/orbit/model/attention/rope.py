"""Rotary position embedding: queries and keys turn with their position, so that scores depend on distances alone.

    (xᵢ, xᵢ₊ₕ) ↦ (xᵢ·cos pfᵢ − xᵢ₊ₕ·sin pfᵢ,  xᵢ₊ₕ·cos pfᵢ + xᵢ·sin pfᵢ),   fᵢ = base^(−2i/d),   h = d/2

    B batch, H heads, T tokens, D dimensions of a head, d ≤ D rotated ones, p the position of a token.

Pairs lie half a head apart, as in Llama, GPT-NeoX and Qwen (the paper and GPT-J pair neighbours; permute weights to
convert). Written with the sign inside the sine, the rotation is x·cos + roll(x, h)·(∓sin): two passes over x.
Su et al. 2021, https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orbit.model.attention.scaling import read_scaling
from orbit.model.errors import SettingError, ShapeError

__all__ = ["RotaryPositionalEmbedding", "Rotation", "rotate"]


class Rotation(NamedTuple):
    """What turns the tokens at given positions: made once a forward, used by every layer.

    Both are (T, d) or (B, 1, T, d). `sin` is negative in its first half; do not fill it with another library's.
    """

    cos: Tensor
    sin: Tensor


def rotate(x_BHTD: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys: the first d dimensions of each head, the rest is passed on. Same dtype as `x_BHTD`.

    Raises:
        SettingError: cos and sin of another origin, whose signs are theirs.
        ShapeError: heads are narrower than the rotation, or have another number of tokens or rows.
    """
    if not isinstance(rotation, Rotation):
        raise SettingError(f"a rotation comes from rope(positions), not as {type(rotation).__name__}")
    cos, sin = (part.to(x_BHTD.dtype) for part in rotation)
    dim = cos.shape[-1]
    if dim > x_BHTD.shape[-1] or cos.shape[-2] != x_BHTD.shape[-2]:
        raise ShapeError(
            f"a rotation of {cos.shape[-2]} positions and {dim} dimensions does not fit heads of shape "
            f"{tuple(x_BHTD.shape)}, (B, H, T, D): make it for these positions with rope(positions)"
        )
    if cos.dim() == 4 and cos.shape[0] not in (1, x_BHTD.shape[0]):
        raise ShapeError(f"a rotation of {cos.shape[0]} rows does not fit a batch of {x_BHTD.shape[0]}")
    turned = x_BHTD[..., :dim]
    turned = torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin)
    return turned if dim == x_BHTD.shape[-1] else torch.cat((turned, x_BHTD[..., dim:]), -1)


class RotaryPositionalEmbedding(nn.Module):
    """cos and sin for the positions at hand, in float32; nothing is stored, so there is no longest sequence.

    Args:
        head_dim: width of a head.
        base: longest wavelength / 2π ("rope_theta").
        rotary_dim: rotated dimensions of a head, even; all unless given.
        scaling: for contexts longer than the trained one, as in config.json, for example
            `{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}`.
            Types: linear, ntk, dynamic, yarn, llama3 (see `scaling.py`).

    Without buffers nothing is rounded by `.half()` or lost by `.to_empty()`, and the state_dict has no keys. "dynamic"
    looks at the greatest position of each call, so keys that a cache holds keep the turn of their own call.

    >>> rope = RotaryPositionalEmbedding(head_dim=8)
    >>> q_BHTD = torch.randn(1, 2, 5, 8)
    >>> rotate(q_BHTD, rope(torch.arange(5))).shape
    torch.Size([1, 2, 5, 8])

    Raises:
        SettingError: an odd or too large dimension, a base that is not above 1, an unknown scaling.
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rotary_dim: int | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        dim = head_dim if rotary_dim is None else rotary_dim
        if dim % 2 or not 2 <= dim <= head_dim:
            raise SettingError(
                f"{'head_dim' if rotary_dim is None else 'rotary_dim'} {dim} cannot be rotated: dimensions turn in "
                f"pairs, choose an even number from 2 to {head_dim}"
            )
        if not base > 1:
            raise SettingError(f"base {base} gives no falling frequencies: choose one above 1, usually 10000")
        self.head_dim, self.rotary_dim, self.base = head_dim, dim, float(base)
        self.scaling = read_scaling(scaling)
        if dim == 2 and scaling is not None and scaling["rope_type"] in ("ntk", "dynamic"):
            raise SettingError(
                "ntk and dynamic scaling stretch between pairs: they need at least 4 rotated dimensions"
            )

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation:
        """The rotation of integer positions (T,) or (B, T), in `dtype`; computed in float32.

        Raises:
            ShapeError: positions are no integers or have another shape.
        """
        if positions.dim() not in (1, 2) or positions.is_floating_point() or positions.dtype == torch.bool:
            raise ShapeError(
                f"positions are integers of shape (T,) or (B, T), not {tuple(positions.shape)} of {positions.dtype}"
            )
        length = positions.max() + 1 if self.scaling.needs_length else None
        frequencies = self.scaling.frequencies(self.base, self.rotary_dim, positions.device, length)
        angle = positions[..., None] * frequencies
        cos, sin = angle.cos(), angle.sin()
        if self.scaling.amplitude != 1:
            cos, sin = cos * self.scaling.amplitude, sin * self.scaling.amplitude
        cos, sin = torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)
        return Rotation(cos, sin) if positions.dim() == 1 else Rotation(cos[:, None], sin[:, None])

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}, rotary_dim={self.rotary_dim}, scaling={self.scaling}"

"""Sinusoidal positions: a fixed vector for every position, added to the embeddings.

    PE(p, 2i) = sin(p / base^(2i/D)),   PE(p, 2i+1) = cos(p / base^(2i/D))

    B batch, T tokens, D width, p the position of a token.

Computed for the positions at hand and never stored: there is no longest sequence and no key in the state_dict.
Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orbit.model.attention.scaling import powers
from orbit.model.errors import SettingError, ShapeError

__all__ = ["SinusoidalPositionalEmbedding"]


class SinusoidalPositionalEmbedding(nn.Module):
    """Adds positions to x_BTD.

    Args:
        hidden_size: D, even.
        base: longest wavelength / 2π.

    >>> add_positions = SinusoidalPositionalEmbedding(4)
    >>> add_positions(torch.zeros(1, 2, 4))
    tensor([[[0.0000, 1.0000, 0.0000, 1.0000],
             [0.8415, 0.5403, 0.0100, 0.9999]]])

    Raises:
        SettingError: an odd width.
    """

    def __init__(self, hidden_size: int, base: float = 10000.0) -> None:
        super().__init__()
        if hidden_size < 2 or hidden_size % 2:
            raise SettingError(
                f"hidden_size {hidden_size} holds no pairs of sine and cosine: choose an even number"
            )
        if not base > 1:
            raise SettingError(f"base {base} gives no falling frequencies: choose one above 1, usually 10000")
        self.hidden_size, self.base = hidden_size, float(base)

    def forward(self, x_BTD: Tensor, positions: Tensor | None = None) -> Tensor:
        """x + PE in x's dtype; positions (T,) or (B, T), 0 … T−1 unless given.

        Raises:
            ShapeError: another width than `hidden_size`, or positions that do not fit.
        """
        if x_BTD.dim() < 2 or x_BTD.shape[-1] != self.hidden_size:
            raise ShapeError(f"input of shape {tuple(x_BTD.shape)}: (B, T, {self.hidden_size}) is needed")
        if positions is None:
            positions = torch.arange(x_BTD.shape[-2], device=x_BTD.device)
        elif tuple(positions.shape) not in (x_BTD.shape[-2:-1], x_BTD.shape[:-1]):
            raise ShapeError(
                f"positions of shape {tuple(positions.shape)} do not fit input {tuple(x_BTD.shape)}: (T,) or (B, T)"
            )
        elif positions.is_floating_point() or positions.dtype == torch.bool:
            raise ShapeError(f"positions are integers, not {positions.dtype}")
        return x_BTD + self.encode(positions).to(x_BTD.dtype)

    def encode(self, positions: Tensor) -> Tensor:
        """PE alone: positions (…) ↦ (…, D), in float32."""
        angle = positions[..., None].float() * powers(self.base, self.hidden_size, positions.device)
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, base={self.base:g}"

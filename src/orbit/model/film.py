"""FiLM: a context scales and shifts every feature.

    y = (1 + γ) ⊙ x + β,  [γ; β] = W·c + b        c (B, context)   W (2·F, context)   x, y (B, F, …) or (B, …, F)

W and b start at zero, so that a fresh block is the identity; the paper writes γ for our 1 + γ.

Source: Perez et al. 2017, https://arxiv.org/abs/1709.07871, eq. 2 and appendix (the 1 + Δγ form).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orbit.model.errors import SettingError, ShapeError

__all__ = ["FiLM"]


class _Modulation(nn.Linear):
    """A linear layer that starts at zero."""

    initialized_as = "modulation"  # by auto_initialize, which calls reset_parameters

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class FiLM(nn.Module):
    """Feature-wise linear modulation of `x` by a context.

    Args:
        context_size: width of the context.
        features: number of features of the input.
        channel_dim: where the features are: 1 for images and signals, −1 for tokens.

    Shapes:
        x (B, features, …), context (B, context_size) → as x                       channel_dim = 1
        x (B, …, features), context (B, context_size) or (B, …, context_size) → as x     channel_dim = −1

    Raises:
        SettingError: a width below 1, or another `channel_dim`.

    >>> film, x = FiLM(3, features=4, channel_dim=1), torch.randn(2, 4, 8, 8)
    >>> torch.equal(film(x, torch.randn(2, 3)), x)
    True
    """

    def __init__(
        self,
        context_size: int,
        features: int,
        *,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(context_size, features) < 1:
            raise SettingError(f"context_size={context_size}, features={features}: both must be at least 1")
        if channel_dim not in (1, -1):
            raise SettingError(
                f"channel_dim={channel_dim}: features come first after the batch (1) or last (-1)"
            )
        self.features, self.channel_dim = features, channel_dim
        self.proj = _Modulation(context_size, 2 * features, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """W and b to zero: the identity."""
        self.proj.reset_parameters()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Scale and shift the features of x.

        Raises:
            ShapeError: another number of features, or a context that does not fit x.
        """
        last = self.channel_dim == -1
        if x.dim() < 2 or x.shape[self.channel_dim] != self.features:
            raise ShapeError(
                f"the input has the shape {tuple(x.shape)}; this block modulates dimension {self.channel_dim} of "
                f"width {self.features}"
            )
        if context.dim() < 2 or context.shape[-1] != self.proj.in_features:
            raise ShapeError(
                f"a context of the shape {tuple(context.shape)}: this block reads {self.proj.in_features} features, "
                f"({len(x)}, {self.proj.in_features})"
            )
        each_position = last and context.dim() == x.dim()
        wanted = x.shape[:-1] if each_position else x.shape[:1]
        if context.shape[:-1] != wanted:
            raise ShapeError(
                f"a context of the shape {tuple(context.shape)} does not fit an input of the shape {tuple(x.shape)}: "
                f"give one a sample, ({len(x)}, {self.proj.in_features})"
            )
        modulation = self.proj(context)
        if not each_position:
            here = [1] * (x.dim() - 2)
            shape = (*here, 2 * self.features) if last else (2 * self.features, *here)
            modulation = modulation.reshape(len(x), *shape)
        gamma, beta = modulation.chunk(2, self.channel_dim)
        return (1 + gamma) * x + beta

    def extra_repr(self) -> str:
        return f"channel_dim={self.channel_dim}"

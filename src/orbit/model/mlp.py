"""The feed-forward block, plain and gated.

    plain   y = W_down·φ(W_up·x)
    gated   y = W_down·(φ(W_gate·x) ⊙ W_up·x)      φ = silu: SwiGLU, φ = gelu: GEGLU [1]

    x (…, in)   W_up, W_gate (hidden, in)   W_down (out, hidden)   y (…, out)      biases if `bias`

Dropout falls on what enters W_down. The names of the layers are Llama's.

[1] Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orbit.model.activation import activation_of
from orbit.model.errors import SettingError

__all__ = ["MLP"]


class MLP(nn.Module):
    """Two linear layers with an activation between them; three with a gate.

    Args:
        in_features: width of the input.
        hidden_features: width between the layers; 4 × `in_features` unless given.
        out_features: width of the output; `in_features` unless given.
        activation: a name (relu, gelu, gelu_tanh, silu, tanh, sigmoid), or any function of a tensor; a module
            becomes part of the block.
        gated: multiply the activated gate with a second projection.
        bias: give every layer a bias.
        dropout: probability in training that an entry of the hidden layer is dropped.

    Shapes:
        (…, in_features) → (…, out_features)

    Raises:
        SettingError: an unknown activation, a width below 1, a probability outside [0, 1).

    >>> MLP(8, 16, gated=True, activation="silu", bias=False)(torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        for name, width in (("in", in_features), ("hidden", hidden_features), ("out", out_features)):
            if width < 1:
                raise SettingError(f"{name}_features={width}: a layer needs a width of at least 1")
        if not 0 <= dropout < 1:
            raise SettingError(f"dropout={dropout} is no probability below 1; 0 switches it off")
        self.activation = activation if callable(activation) else activation_of(activation).forward
        self.gate_proj = (
            nn.Linear(in_features, hidden_features, bias, device=device, dtype=dtype) if gated else None
        )
        self.up_proj = nn.Linear(in_features, hidden_features, bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden_features, out_features, bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) → (…, out_features)."""
        if self.gate_proj is None:
            hidden = self.activation(self.up_proj(x))
        else:
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.dropout(hidden))

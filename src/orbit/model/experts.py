"""Stacked experts: E feed-forward blocks (`mlp.py`) in one module, each on the tokens that were sent to it.

    y_t = Σ_k w_tk·W_down[i]·(φ(W_gate[i]·x_t) ⊙ W_up[i]·x_t),  i = i_tk        without a gate: W_down[i]·φ(W_up[i]·x_t)

    x, y (T, D)   w, i (T, K)   gate_up_proj (E, 2·I, D): W_gate over W_up, or up_proj (E, I, D)   down_proj (E, D, I)
    T tokens, D width, I inner width, E experts, K experts a token, S = T·K rows

Names and layout are those of transformers' experts; an index of E means nobody, as there.

Rows are sorted by expert once. On a CUDA device, in bfloat16, `grouped_mm` then runs all experts in one kernel and
nothing waits for the device; elsewhere an operator takes expert after expert (`experts_op.py`). Rows come back
to their tokens by the inverse of the sort, so that the order in which a token's experts are added never changes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.model.activation import activation_of
from orbit.model.errors import SettingError
from orbit.model.experts_op import experts

__all__ = ["Experts"]


class Experts(nn.Module):
    """E stacked feed-forward blocks without biases.

    Args:
        hidden_size: width of tokens, D.
        intermediate_size: width inside, I.
        num_experts: E.
        gated: SwiGLU and its like (three matrices an expert) or the plain block (two).
        activation: relu, gelu, gelu_tanh, silu, tanh or sigmoid.

    Raises:
        SettingError: an unknown activation, or a size below 1.
    """

    initialized_as = "experts"  # by auto_initialize, which calls reset_parameters

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        gated: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise SettingError(
                f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, num_experts={num_experts}: "
                "each must be at least 1"
            )
        activation_of(activation)
        self.gated, self.activation = gated, activation
        self.num_experts = num_experts

        def stack(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, rows, columns, device=device, dtype=dtype))

        if gated:
            self.gate_up_proj = stack(2 * intermediate_size, hidden_size)
        else:
            self.up_proj = stack(intermediate_size, hidden_size)
        self.down_proj = stack(hidden_size, intermediate_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each matrix of each expert ~ U(−1/√in, 1/√in), as `nn.Linear` draws it."""
        for weight in self.parameters(recurse=False):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Send each token through its experts.

        Args:
            x: (T, D).
            indices: (T, K) the experts of each token, or E for none.
            weights: (T, K) by how much each counts.

        Returns:
            (T, D), in the dtype of x, or in autocast's.
        """
        up: Tensor = self.gate_up_proj if self.gated else self.up_proj
        down: Tensor = self.down_proj
        if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
        # Expert after expert; for one expert, first choices before second ones.
        expert_S, order_S = indices.T.reshape(-1).sort(stable=True)
        ends_E = torch.searchsorted(
            expert_S, torch.arange(len(up), device=x.device), right=True, out_int32=True
        )
        if _one_kernel(x, up, down):
            return grouped_experts(x, up, down, weights, order_S, ends_E, self.activation)
        return experts(x, up, down, weights, order_S, ends_E, self.activation)

    def extra_repr(self) -> str:
        experts, hidden, inner = self.down_proj.shape
        return f"{hidden}, {inner}, num_experts={experts}, gated={self.gated}, activation={self.activation!r}"


def _one_kernel(x: Tensor, up: Tensor, down: Tensor) -> bool:
    """Does `grouped_mm` run these as a single kernel? It wants strides of whole 16 bytes."""
    return (
        x.is_cuda
        and x.dtype == up.dtype == down.dtype == torch.bfloat16
        and down.shape[1] % 8 == down.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def grouped_experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor, activation: str
) -> Tensor:
    """The same by `grouped_mm`, for dtypes and strides that it takes.

    Args:
        x, up, down, weights: see the module's legend; weights (T, K).
        order: (S,) the row k·T + t that stands at each place of the sorted order.
        ends: (E,) int32, where each expert's rows end. Nobody owns what comes behind the last end.
    """
    phi = activation_of(activation).forward
    tokens, choices = weights.shape
    owned_S1 = (torch.arange(len(order), device=x.device) < ends[-1])[:, None]
    place_S = order.argsort()
    h_SF = F.grouped_mm(_Spread.apply(x, order, place_S, owned_S1), up.transpose(1, 2), offs=ends)
    if up.shape[1] != down.shape[2]:
        gate_SI, value_SI = h_SF.chunk(2, -1)
        h_SI = phi(gate_SI) * value_SI
    else:
        h_SI = phi(h_SF)
    # grouped_mm leaves the rows of nobody as memory was
    y_SD = F.grouped_mm(h_SI, down.transpose(1, 2), offs=ends).masked_fill(~owned_S1, 0)
    y_KTD = _Arrange.apply(y_SD, place_S, order).unflatten(0, (choices, tokens))
    return (y_KTD * weights.T[..., None]).sum(0).to(x.dtype)


class _Spread(torch.autograd.Function):
    """x_S = x[order mod T]; backward adds a token's rows in a fixed order, and reads no row of nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, owned: Tensor) -> Tensor:
        ctx.save_for_backward(place, owned)
        ctx.tokens = len(x)
        return x.index_select(0, order % max(len(x), 1))

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        place, owned = ctx.saved_tensors
        d = d.masked_fill(~owned, 0).index_select(0, place)
        wide = torch.promote_types(d.dtype, torch.float32)
        return d.unflatten(0, (-1, ctx.tokens)).sum(0, dtype=wide).to(d.dtype), None, None, None


class _Arrange(torch.autograd.Function):
    """x[order] for a permutation; backward is x[inverse], without adding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return d.index_select(0, inverse), None, None

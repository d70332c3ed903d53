"""LoRA's low-rank branch.

    W' = W + ΔW,    ΔW = s·B·A          y = x·W'ᵀ + b = base + h·Bᵀ,    h = s·x·Aᵀ

    x (…, in)   base (…, out), the layer's own output   A (r, in)   B (out, r)   h (…, r)
    s = α/r, or α/√r for rsLoRA; a 0-d tensor

Backward, with g = s·(dy·B):  d_base = dy   dx = g·A   dA = gᵀ·x   dB = dyᵀ·h. It keeps x, which its
neighbours keep anyway, and h, which is small; never ΔW, nor a copy of x in the adapter's dtype. h is returned
as a second output because that makes second derivatives exact.

Sources: Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 for rsLoRA (arXiv 2312.03732). B = 0 at the
start, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def low_rank(base: Tensor, x: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    """base + s·x·Aᵀ·Bᵀ in the dtype of `base`; shapes as in the module's legend.

    Computes in the adapter's dtype (float32 adapters on a bf16 base work in float32, as in PEFT), or in
    autocast's where autocast is on.
    """
    if torch.is_grad_enabled():
        return LowRank.apply(base, x, A, B, s)[0]
    return LowRank.forward(base, x, A, B, s)[0]


def compute_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype in which the branch multiplies: autocast's where it applies, else the adapter's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return A.dtype


class LowRank(torch.autograd.Function):
    """The branch with the backward of the module's legend."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, x: Tensor, A: Tensor, B: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(x, A)
        h = s * (x.to(dtype) @ A.to(dtype).T)
        y = (base + h @ B.to(dtype).T).to(base.dtype)
        return y, h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        _, x, A, B, s = inputs
        ctx.save_for_backward(x, A, B, s, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, A, B, s, h = ctx.saved_tensors
        dtype = h.dtype
        dB = None
        if dy is not None:
            dy_c = dy.to(dtype)
            dh = dy_c @ B.to(dtype) if dh is None else dh + dy_c @ B.to(dtype)
            if ctx.needs_input_grad[3]:
                dB = (rows(dy_c).T @ rows(h)).to(B.dtype)
        if dh is None:
            return None, None, None, None, None
        g = s * dh
        dx = (g @ A.to(dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None
        dA = (rows(g).T @ rows(x).to(dtype)).to(A.dtype) if ctx.needs_input_grad[2] else None
        return dy, dx, dA, dB, None


def rows(t: Tensor) -> Tensor:
    """(…, d) seen as (rows, d)."""
    return t.reshape(-1, t.shape[-1])


def fresh_factors(
    in_features: int, out_features: int, r: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A new pair: A ~ Kaiming-uniform (a = √5, the init of `nn.Linear`, as in PEFT), B = 0."""
    A = torch.empty(r, in_features, device=device, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(out_features, r, device=device, dtype=dtype)

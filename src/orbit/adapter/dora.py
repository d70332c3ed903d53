"""DoRA: the low-rank update turns each row of the weight, a learned magnitude sets its length.

    W' = m∘V/n,    V = W + s·B·A,    n = ‖V‖ row by row, taken as a constant in the backward pass
    y  = b + c∘(u − b) = u + (c − 1)∘(u − b),    u = base + s·x·Aᵀ·Bᵀ  (`lora.low_rank`),    c = m/n

    W (out, in)   A (r, in)   B (out, r)   m, n, c (out,)   base = x·Wᵀ + b   u, y (…, out)

Linear layers put c − 1 and c∘B into the one form of `lora.py` (its D and B), which gives the same.
The right-hand form of y leaves a fresh adapter's output unchanged to the last bit: m starts as n, so c − 1 =
0. There is no epsilon; a row whose V is exactly zero has no direction and gets c = 1 instead of 0/0.

The norm never forms V (in bf16, W + s·B·A rounds the update away, and it is as large as W):

    n² = ‖W‖² + 2s·Σᵣ(B∘(W·Aᵀ)) + s²·Σᵣ((B·A·Aᵀ)∘B)      row by row, in at least float32

‖W‖² is cached by the layer while W is frozen. The magnitude's gradient is dm = Σ dy∘(u − b)/n over all rows
of x; where m ≠ 0 that is Σ dy∘(y − b)/m, but it also holds at m = 0 and survives an in-place activation on y.

Source: Liu et al. 2024 (arXiv 2402.09353), its section 4.3 for the detached norm. PEFT agrees to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(w2: Tensor, WA: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    """‖W + s·B·A‖ row by row, without forming it and without gradient.

    Args:
        w2: (out,) squared row norms of W.
        WA: (out, r) the product W·Aᵀ.
        A, B, s: the adapter; see the module's legend.

    Returns:
        (out,) in the dtype of `w2`, at least float32.
    """
    with torch.no_grad():
        A, B = A.to(w2.dtype), B.to(w2.dtype)
        cross = (B * WA.to(w2.dtype)).sum(1)
        square = ((B @ (A @ A.T)) * B).sum(1)
        return (w2 + 2 * s * cross + s * s * square).clamp_min(0).sqrt()


def squared_rows(W: Tensor) -> Tensor:
    """(out,) squared row norms of a dense weight, in at least float32."""
    with torch.no_grad():
        return W.to(wide(W.dtype)).square().sum(1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ratio(m: Tensor, n: Tensor) -> Tensor:
    """c = m/n, and 1 where n is exactly 0."""
    empty = n == 0
    return torch.where(empty, torch.ones_like(n), m / torch.where(empty, torch.ones_like(n), n))


def rescale(u: Tensor, bias: Tensor | None, c: Tensor) -> Tensor:
    """b + c∘(u − b) in the dtype of `u`, written so that c = 1 returns u to the last bit."""
    centred = u if bias is None else u - bias.to(u.dtype)
    return (u + (c - 1) * centred).to(u.dtype)

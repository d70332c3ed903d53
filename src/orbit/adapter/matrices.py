"""The arithmetic of `algebra.py` on matrices Δ (…, out, in) and their factors A (…, r, in), B (…, out, r).

The equations stand there; what has leading axes (experts) is trimmed and drawn as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A new update B·A (without a scale), and what it misses of Δ."""

    A: Tensor
    B: Tensor
    missed: float
    norm: float


def svd(Delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, out, k), S (…, k), Vᵀ (…, k, in), k = min(out, in)."""
    return torch.linalg.svd(Delta, full_matrices=False)


def svd_of_product(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of B·A without forming it: B = Q_b·R_b, Aᵀ = Q_a·R_a, and the SVD of R_b·R_aᵀ (r, r)."""
    Qb, Rb = torch.linalg.qr(B)
    Qa, Ra = torch.linalg.qr(A.mT)
    U, S, Vt = svd(Rb @ Ra.mT)
    return Qb @ U, S, Vt @ Qa.mT


def truncated(U: Tensor, S: Tensor, Vt: Tensor, r: int) -> Factors:
    """B = U·√S, A = √S·Vᵀ of the first r singular triplets, or of all where there are fewer."""
    root = S[..., :r].sqrt()
    A, B = root[..., :, None] * Vt[..., :r, :], U[..., :, :r] * root[..., None, :]
    return Factors(A, B, float(S[..., r:].norm()), float(S.norm()))


def norm_of_product(A: Tensor, B: Tensor) -> float:
    """‖B·A‖ = √(Σ (BᵀB)∘(A·Aᵀ)), Frobenius, without forming it."""
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt())


def _sum(deltas: Sequence[Tensor], density: float, rng: torch.Generator) -> Tensor:
    return torch.stack(list(deltas)).sum(0)


def _magnitude_prune(deltas: Sequence[Tensor], density: float, rng: torch.Generator) -> Tensor:
    return _sum([_trim(delta, density) for delta in deltas], density, rng)


def _dare(deltas: Sequence[Tensor], density: float, rng: torch.Generator) -> Tensor:
    return _sum([_drop(delta, density, rng) for delta in deltas], density, rng)


def _ties(deltas: Sequence[Tensor], density: float, rng: torch.Generator) -> Tensor:
    return _elect([_trim(delta, density) for delta in deltas])


def _dare_ties(deltas: Sequence[Tensor], density: float, rng: torch.Generator) -> Tensor:
    return _elect([_drop(delta, density, rng) for delta in deltas])


# How the weighted updates of the tasks become one matrix: SUMS[method](deltas, density, rng).
SUMS: dict[str, Callable[[Sequence[Tensor], float, torch.Generator], Tensor]] = {
    "svd": _sum,
    "magnitude_prune": _magnitude_prune,
    "dare": _dare,
    "ties": _ties,
    "dare_ties": _dare_ties,
}


def _trim(delta: Tensor, density: float) -> Tensor:
    """Its ⌊density·n⌋ entries of largest magnitude, and at least one."""
    flat = delta.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(delta)


def _drop(delta: Tensor, density: float, rng: torch.Generator) -> Tensor:
    mask = torch.bernoulli(torch.full(delta.shape, density), generator=rng)  # on the CPU: the same everywhere
    return delta * mask.to(delta) / density


def _elect(deltas: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(deltas))
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0).to(stacked)
    agrees = stacked.sign() == sign
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)

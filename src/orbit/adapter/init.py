"""Where an adapter starts. A fresh one changes nothing, to the last bit, wherever it starts.

    kaiming      A ~ U(±√(1/in)), B = 0                 as `nn.Linear` and PEFT's default
    gaussian     A ~ N(0, 1/r²), B = 0                  as PEFT's "gaussian"
    orthogonal   A·Aᵀ = I, B = 0
    pissa        B₀ = U·√(S/s), A₀ = √(S/s)·Vᵀ          of the first r singular triplets W ≈ U·S·Vᵀ
    olora        B₀ = Q, A₀ = R                         of the first r columns and rows of W = Q·R

    W (…, out, in), a layer's weight as a matrix (`Graft.matrix`)   A (…, r, in)   B (…, out, r)   s: the scale

Embeddings, which start with A = 0 and a random B, take these for B in the place of A.

PiSSA and OLoRA train B·A from B₀·A₀. Their authors, and PEFT, subtract s·B₀·A₀ from W, which changes the base under
every other task and rounds it in half precision. Here W stays, and A₀ and B₀ are kept beside A and B instead:

    ΔW = s·(B·A − B₀·A₀)       the same function and gradients as  W_res + s·B·A  with  W_res = W − s·B₀·A₀

PEFT's "orthogonal" starts with B ≠ 0 and makes up for it nowhere, so that a fresh adapter adds noise; its A is
random and not orthonormal. Here only the rows of A are, and B = 0.

EVA, which starts A from data, is a call of its own after `inject` (`eva.py`).

Sources: Hu et al. 2021 (arXiv 2106.09685); PiSSA: Meng et al. 2024 (2404.02948); OLoRA: Büyükakyüz 2024 (2406.01775).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orbit.adapter.config import STARTS_FROM_WEIGHT
from orbit.adapter.errors import GraftError
from orbit.adapter.offload import weights_at_hand

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft
    from orbit.adapter.owners import Slot


def initialise(layer: Graft, slot: Slot, init: str) -> None:
    """Give a fresh slot of `layer`, which starts as "kaiming", the start that `init` names."""
    if init == "kaiming":
        return
    if init in STARTS_FROM_WEIGHT and not layer.STARTS:
        raise GraftError(
            f"{type(layer).__name__} cannot start from its weight (init={init!r}); use 'kaiming', 'gaussian' or "
            "'orthogonal', or exclude it"
        )
    with torch.no_grad():
        A, B = layer.factors(slot)
        if init in STARTS_FROM_WEIGHT:
            with weights_at_hand(layer):
                W = layer.matrix()
            start = _pissa if init == "pissa" else _olora
            A, B = start(W, A.shape[-2], float(slot.up.scale))
        else:
            random = _gaussian_rows if init == "gaussian" else _orthonormal_rows
            if B.count_nonzero():  # an embedding, whose B is random and whose A is 0
                A, B = torch.zeros_like(A), random(B.mT).mT
            else:
                A, B = random(A), torch.zeros_like(B)
        layer.set_factors(slot, A, B)
    if init in STARTS_FROM_WEIGHT:
        slot.start_here()
        if slot.magnitude is not None:
            layer.renorm(slot)


def _pissa(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (S[..., :r] / abs(s)).sqrt()
    sign = 1 if s > 0 else -1
    return root[..., :, None] * Vt[..., :r, :], sign * U[..., :, :r] * root[..., None, :]


def _olora(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(W)
    return R[..., :r, :], Q[..., :, :r]


def _gaussian_rows(A: Tensor) -> Tensor:
    return torch.randn_like(A) / A.shape[-2]


def _orthonormal_rows(A: Tensor) -> Tensor:
    noise = torch.randn(A.mT.shape, device=A.device, dtype=torch.promote_types(A.dtype, torch.float32))
    return torch.linalg.qr(noise).Q.mT.to(A.dtype)

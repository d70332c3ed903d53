"""The low-rank update of a linear layer, in the one form that every variant and every route takes.

    y = u + D∘(u − b) + (C∘(x·Aᵀ))·Bᵀ,      u = x·Wᵀ + b

    x (…, in)   W (out, in)   b (out,) or None   u, y (…, out)
    A (R, in)   B (out, R)    the factors in use; those of several tasks are concatenated
    C           the coefficient of each rank, broadcastable to (…, R):
                  ()            s = α/r, or α/√r for rsLoRA; gated: g·s
                  (R,)          a weighted sum of tasks
                  (rows, 1, R)  one task per row: zero where the row is another task's
                  (batch, seq, R)  scalings per token
                  None          1: B is scaled already
    A (n, R, in), B (n, out, R)  n pairs, one for each n-th of the rows of x; then C is None or ()
    D           None, or DoRA's c − 1 (`dora.py`), broadcastable to (…, out); B is then c∘B already

It is computed in two places that give the same: `fused` multiplies by W too, so that the update is added into
the product where it lies, and its gradient into that of x; `low_rank` takes u from whoever computed it (a
quantised, parametrized or hooked layer).

Backward, with M = dyᵀ·p, p = x·Aᵀ, e = dy·B, g = C∘e and sums over the axes along which an input was broadcast:

    du = dy + D∘dy     dx = du·W + g·A     dA = gᵀ·x     dB = dyᵀ·(C∘p)     dC = Σ e∘p     dD = Σ dy∘(u − b)
    where C is the same for all rows:      dB = C∘M      dC = Σ B∘M

Kept for it is no more than the gradients asked for need: x for those of A and W alone, so a frozen mixture of tasks
keeps no activations; p, which is small, for those of B and C; for D's u, a tensor of its own (never y, which an
activation may overwrite). p is rank-major, (R, tokens): long rows are what BLAS likes.
p and u are outputs too, because that makes second derivatives exact.

Everything is multiplied in the dtype of u: float32 adapters of a bf16 layer are rounded to bf16 for the
product, which accumulates in float32, and get float32 gradients, as under autocast.

Sources: Hu et al. 2021 (arXiv 2106.09685), Kalajdzievski 2023 for rsLoRA (arXiv 2312.03732). B = 0 at the
start, so a fresh adapter changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


def fused(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None = None,
) -> Tensor:
    """The whole adapted layer, y (…, out); shapes as in the module's legend. W is dense.

    Multiplies in the dtype that torch gives u: that of x and W, or autocast's where autocast is on.
    """
    return _update(None, x, W, b, A, B, C, D)


def low_rank(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """The update on top of base = u (…, out), the layer's own output; shapes as in the module's legend.

    b is only needed with D. Multiplies in the dtype of base, also where that is not autocast's: a quantised layer
    may give float32 there.
    """
    kind = base.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and base.dtype != torch.get_autocast_dtype(kind):
        with torch.autocast(kind, enabled=False):
            return _update(base, x, None, b, A, B, C, D)
    return _update(base, x, None, b, A, B, C, D)


class LowRank(torch.autograd.Function):
    """y, p and u of the module's legend: (base, x, W, b, A, B, C, D), with base = u or W given, not both."""

    @staticmethod
    def forward(
        base: Tensor | None,
        x: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        D: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if base is None:
            assert W is not None
            u = F.linear(x, W, b)
        else:
            u = base
        dtype = u.dtype
        p = A.to(dtype) @ parts(x, A).to(dtype).mT
        if C is None or C.dim() < 2:
            q, up = p, (B if C is None else C * B).to(dtype)
        else:
            q, up = by_rank(C, x.shape) * p, B.to(dtype)
        y = u
        if D is not None:
            y = torch.addcmul(u, u if b is None else u - b.to(dtype), D.to(dtype))
        y = y.clone(memory_format=torch.contiguous_format) if y is base else y.contiguous()
        add_product_(parts(y, A), q.mT.to(dtype), up.mT)
        # F.linear may give a view, and autograd refuses in-place activations on a view that a Function made.
        y = torch.ops.aten._unsafe_view.default(y, y.shape)
        return y, p, u if base is None and D is not None else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor | None, ...]) -> None:
        base, x, W, b, A, B, C, D = inputs
        _, p, u = output
        assert x is not None
        assert p is not None
        _, x_asks, W_asks, _, A_asks, B_asks, C_asks, D_asks = ctx.needs_input_grad
        ctx.fused, ctx.shape, ctx.dtypes = W is not None, x.shape, (x.dtype, p.dtype)
        if D is None or not D_asks:
            u = b = None
        elif base is not None:
            u = base
        ctx.save_for_backward(
            x if A_asks or W_asks else None,
            W if x_asks or W_asks else None,
            b,
            A if x_asks or A_asks else None,
            B,
            C,
            D,
            p if B_asks or C_asks else None,
            u,
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dp: Tensor | None, du: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, W, b, A, B, C, D, p, u = ctx.saved_tensors
        _, x_asks, W_asks, b_asks, A_asks, B_asks, C_asks, D_asks = ctx.needs_input_grad
        shape, (x_dtype, dtype), same = ctx.shape, ctx.dtypes, C is None or C.dim() < 2
        dW = db = dA = dB = dC = dD = dx = None
        g = dp
        if dy is not None:
            dys = parts(dy, B)
            up = (B if C is None or not same else C * B).to(dtype)
            e = up.mT @ dys.mT
            q = p
            if not same:
                each = by_rank(C, shape)
                q = (each * p).to(dtype) if B_asks else None
                if C_asks:
                    dC = (e * p).T.view(*shape[:-1], p.shape[0]).sum_to_size(C.shape).to(C.dtype)
                e = (each * e).to(dtype)
            g = e if g is None else g + e
            if B_asks or (C_asks and same):
                M = (q @ dys).mT.to(B.dtype)
                dB = (M if C is None or not same else C * M).to(B.dtype) if B_asks else None
                if C_asks and same:
                    dC = (B * M).sum(0).sum_to_size(C.shape).to(C.dtype)
            through = dy
            if D is not None and W is not None and du is None and D.dim() == 1 and not W_asks:
                W = torch.addcmul(W, W, D[:, None].to(W.dtype))  # dy·(W + D∘W): W is smaller than dy, mostly
            elif D is not None:
                through = torch.addcmul(dy, dy, D.to(dtype))
            if b_asks:  # y = (1 + D)∘(u − b) + b + …, and u has a b of its own where it is computed here
                db = dy if ctx.fused else dy - through
                db = rows(db if du is None else db + du).sum(0)
            du = through if du is None else du + through
            if D_asks:
                centred = u if b is None else u - b.to(dtype)
                if D.dim() == 1:
                    dD = torch.linalg.vecdot(rows(dy), rows(centred), dim=0).to(D.dtype)
                else:
                    dD = (dy * centred).sum_to_size(D.shape).to(D.dtype)
        elif b_asks and du is not None:
            db = rows(du).sum(0)
        if du is not None and W is not None:
            if x_asks:
                dx = rows(du) @ W.to(dtype)
            if W_asks:
                dW = (rows(du).T @ rows(x).to(dtype)).to(W.dtype)
        if g is not None:
            if x_asks and dx is not None:
                add_product_(dx.view(*g.shape[:-2], -1, shape[-1]), g.mT, A.to(dtype))
            elif x_asks:
                low = rows(g.mT @ A.to(dtype))
                dx = low if dx is None else dx + low
            dA = (g @ parts(x, A).to(dtype)).to(A.dtype) if A_asks else None
        dx = None if dx is None else dx.view(shape).to(x_dtype)
        return None if ctx.fused else du, dx, dW, db, dA, dB, dC, dD


def _update(*inputs: Tensor | None) -> Tensor:
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _plain(*inputs)  # type: ignore[arg-type]
    if not torch.is_grad_enabled():
        return LowRank.forward(*inputs)[0]  # type: ignore[arg-type]
    return LowRank.apply(*inputs)[0] if torch.compiler.is_compiling() else _apply(*inputs)[0]


def _plain(
    base: Tensor | None,
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    D: Tensor | None,
) -> Tensor:
    """y by torch's own operations, which can be batched (`vmap`) and differentiated forwards."""
    if base is None:
        assert W is not None
        base = F.linear(x, W, b)
    dtype = base.dtype
    p = parts(x, A).to(dtype) @ A.to(dtype).mT
    if C is None or C.dim() < 2:
        q, up = p, B if C is None else C * B
    else:
        q, up = rows(C * p.view(*x.shape[:-1], -1)), B
    update = (q.to(dtype) @ up.to(dtype).mT).reshape(base.shape)
    if D is None:
        return base + update
    return base + D.to(dtype) * (base if b is None else base - b.to(dtype)) + update


# `Function.apply` without its look at the signature of `forward`, which takes longer than all the rest of it.
_apply = super(torch.autograd.Function, LowRank).apply


def compute_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """The dtype in which other kinds multiply: autocast's where it applies, else the adapter's."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return A.dtype


def rows(t: Tensor) -> Tensor:
    """(…, d) seen as (rows, d)."""
    return t.reshape(-1, t.shape[-1])


def parts(t: Tensor, A: Tensor) -> Tensor:
    """t (…, d) as the factors A multiply it: (rows, d), or (n, rows/n, d) for n pairs of factors."""
    return rows(t) if A.dim() == 2 else t.reshape(A.shape[0], -1, t.shape[-1])


def add_product_(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a·b for matrices or batches of them; y is a view of what is added to."""
    if y.dim() == 2:
        y.addmm_(a, b)
    else:
        y.baddbmm_(a, b)


def by_rank(C: Tensor, shape: torch.Size) -> Tensor:
    """C, broadcastable to (…, R), for every row of an x of this shape: (R, rows)."""
    return C.expand(*shape[:-1], C.shape[-1]).reshape(-1, C.shape[-1]).T


def fresh_factors(
    in_features: int, out_features: int, r: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A new pair: A ~ Kaiming-uniform (a = √5, the init of `nn.Linear`, as in PEFT), B = 0."""
    A = torch.empty(r, in_features, device=device, dtype=dtype)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    return A, torch.zeros(out_features, r, device=device, dtype=dtype)

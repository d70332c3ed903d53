"""Experts one after another, as one operator with its own backward: `torch.ops.orbit.experts`.

    y_t = Σ_s w_s·W_down[e]·h_s,   h_s = φ(W_gate[e]·x_t) ⊙ W_up[e]·x_t   over the rows s of token t, e the expert of s

    x, y (T, D)   up (E, 2·I, D) = W_gate over W_up, or (E, I, D) without a gate: h_s = φ(W_up[e]·x_t)   down (E, D, I)
    w, token (S,): the weight and the token of each row; rows are sorted by expert, and expert e's end before ends[e]

Takes every dtype and device. What is added up per token is added in at least float32. Each expert multiplies its
own rows only, and everything between its multiplications is small enough to stay in cache: on a CPU this is
faster than `grouped_mm`, whose intermediates are as long as S (`benchmarks/blocks.py`). On a GPU reading `ends`
waits for the device, which `grouped_mm` does not. Backward saves x and what enters φ and ⊙; h is computed again.

As an operator it is a single node of a compiled graph, although it depends on the values of `ends`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orbit.model.activation import ACTIVATIONS

__all__ = ["experts"]


@torch.library.custom_op("orbit::experts", mutates_args=())
def experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, token: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and for the backward pass W_gate·x and W_up·x row by row (the first is empty without a gate)."""
    inner, rows = down.shape[2], len(token)
    phi = ACTIVATIONS[activation].forward
    gate = x.new_empty(rows if up.shape[1] != inner else 0, inner)
    value = x.new_empty(rows, inner)
    y = torch.zeros_like(x, dtype=_wide(x), memory_format=torch.contiguous_format)
    for e, mine in _segments(ends):
        x_e = x.index_select(0, token[mine])
        torch.mm(x_e, up[e, -inner:].T, out=value[mine])
        if len(gate):
            torch.mm(x_e, up[e, :inner].T, out=gate[mine])
            h = phi(gate[mine]).mul_(value[mine])
        else:
            h = phi(value[mine])
        y.index_add_(0, token[mine], (h @ down[e].T).to(y.dtype).mul_(weights[mine, None]))
    return y.to(x.dtype), gate, value


@torch.library.custom_op("orbit::experts_backward", mutates_args=())
def _backward(
    d: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate: Tensor,
    value: Tensor,
    activation: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, up, down (both empty if `frozen`) and weights."""
    inner = down.shape[2]
    phi = ACTIVATIONS[activation]
    dx = torch.zeros_like(x, dtype=_wide(x), memory_format=torch.contiguous_format)
    dup, ddown = (w.new_empty(0) if frozen else torch.empty_like(w) for w in (up, down))
    dweights = torch.zeros_like(weights)
    for e, mine in _segments(ends):
        d_e, v = d.index_select(0, token[mine]), value[mine]
        w = weights[mine, None].to(d.dtype)
        dh = d_e @ down[e]
        if len(gate):
            g = gate[mine]
            p = phi.forward(g)
            h = p * v
        else:
            h = phi.forward(v)
        torch.linalg.vecdot(h.to(weights.dtype), dh.to(weights.dtype), out=dweights[mine])
        if not frozen:
            torch.mm(d_e.mul_(w).T, h, out=ddown[e])
        dh.mul_(w)
        parts = [dh.mul(p), phi.backward(dh.mul_(v), g)] if len(gate) else [phi.backward(dh, v)]
        if not frozen:
            x_e = x.index_select(0, token[mine])
            for part, dw in zip(parts, (dup[e, -inner:], dup[e, :inner]), strict=False):
                torch.mm(part.T, x_e, out=dw)
        dx_e = parts[0] @ up[e, -inner:]
        if len(gate):
            dx_e.addmm_(parts[1], up[e, :inner])
        dx.index_add_(0, token[mine], dx_e.to(dx.dtype))
    return dx.to(x.dtype), dup, ddown, dweights


def _segments(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(ends.tolist()):
        yield e, slice(start, end)
        start = end


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@experts.register_fake
def _(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, token: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, inner = token.shape[0], down.shape[2]
    gate = x.new_empty(rows if up.shape[1] != inner else 0, inner)
    return torch.empty_like(x, memory_format=torch.contiguous_format), gate, x.new_empty(rows, inner)


@_backward.register_fake
def _(
    d: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    token: Tensor,
    ends: Tensor,
    gate: Tensor,
    value: Tensor,
    activation: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup, ddown = (w.new_empty(0) if frozen else torch.empty_like(w) for w in (up, down))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, dup, ddown, torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d is None:
        return (None,) * 7
    frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
    dx, dup, ddown, dw = _backward(d, *ctx.saved_tensors, ctx.activation, frozen)
    return dx, *((None, None) if frozen else (dup, ddown)), dw, None, None, None


experts.register_autograd(_gradients, setup_context=_save)

"""Experts one after another, each on its own rows, with a backward pass of its own: `experts`.

    y_t = Σ_s w_s·W_down[e]·h_s,   h_s = φ(W_gate[e]·x_t) ⊙ W_up[e]·x_t   over the rows s of token t, e the expert of s

    x, y (T, D)   up (E, 2·I, D) = W_gate over W_up, or (E, I, D) without a gate: h_s = φ(W_up[e]·x_t)   down (E, D, I)
    w, token (S,): the weight and the token of each row; rows are sorted by expert, and expert e's end before ends[e]

Takes every dtype and device. What is added up per token is added in at least float32. Everything between an
expert's multiplications is small enough to stay in cache, where `grouped_mm` leaves tensors as long as S: on a
CPU this is the faster way (`benchmarks/blocks.py`). On a GPU reading `ends` waits for the device, which
`grouped_mm` does not. Backward keeps x and what enters φ and ⊙; h is computed again.

In a compiled graph it is a single node, `torch.ops.orbit.experts`, since it depends on the values of `ends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orbit.model.activation import ACTIVATIONS

__all__ = ["experts"]


def experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, token: Tensor, ends: Tensor, activation: str
) -> Tensor:
    """y (T, D) of the module's legend; differentiable, once, by x, up, down and weights."""
    if torch.compiler.is_compiling():
        return torch.ops.orbit.experts(x, up, down, weights, token, ends, activation)[0]
    return _Experts.apply(x, up, down, weights, token, ends, activation)


Pieces = Sequence[Tensor]  # one an expert


def _forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    w: Pieces,
    tokens: Pieces,
    activation: str,
    gate: Pieces,
    value: Pieces,
) -> Tensor:
    """y; fills `value` with W_up·x and, of gated experts, `gate` with W_gate·x."""
    phi, inner = ACTIVATIONS[activation].forward, down.shape[2]
    y = torch.zeros_like(x, dtype=_wide(x), memory_format=torch.contiguous_format)
    for e, rows in enumerate(tokens):
        x_e = x.index_select(0, rows)
        torch.mm(x_e, up[e, -inner:].T, out=value[e])
        if gate:
            torch.mm(x_e, up[e, :inner].T, out=gate[e])
            h = phi(gate[e]).mul_(value[e])
        else:
            h = phi(value[e])
        y.index_add_(0, rows, (h @ down[e].T).to(y.dtype).mul_(w[e][:, None]))
    return y.to(x.dtype)


def _backward(
    d: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    w: Pieces,
    tokens: Pieces,
    activation: str,
    gate: Pieces,
    value: Pieces,
    frozen: bool,
    dw: Pieces,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, up and down (both empty if `frozen`); fills `dw` with those of the weights."""
    phi, inner = ACTIVATIONS[activation], down.shape[2]
    dx = torch.zeros_like(x, dtype=_wide(x), memory_format=torch.contiguous_format)
    dup, ddown = (weight.new_empty(0) if frozen else torch.empty_like(weight) for weight in (up, down))
    for e, rows in enumerate(tokens):
        d_e = d.index_select(0, rows)
        dh = d_e @ down[e]  # of the output before it is weighted
        p = phi.forward(gate[e] if gate else value[e])
        h = p * value[e] if gate else p
        dw[e].copy_(torch.linalg.vecdot(h, dh))
        w_e = w[e][:, None].to(d.dtype)
        dh.mul_(w_e)
        if not frozen:
            torch.mm(d_e.mul_(w_e).T, h, out=ddown[e])
        if gate:
            dvalue = torch.mul(dh, p, out=h)
            dgate = phi.backward(dh.mul_(value[e]), gate[e])
            dx_e = (dvalue @ up[e, inner:]).addmm_(dgate, up[e, :inner])
        else:
            dvalue = phi.backward(dh, value[e])
            dx_e = dvalue @ up[e]
        dx.index_add_(0, rows, dx_e.to(dx.dtype))
        if not frozen:
            x_e = x.index_select(0, rows)
            torch.mm(dvalue.T, x_e, out=dup[e, -inner:])
            if gate:
                torch.mm(dgate.T, x_e, out=dup[e, :inner])
    return dx.to(x.dtype), dup, ddown


class _Experts(torch.autograd.Function):
    """Keeps its rows in pieces: on a CPU, memory freshly mapped for long tensors costs more than their use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
        weights, token, ends, activation = rest
        ctx.stops, ctx.activation = ends.tolist(), activation
        tokens, w = _cut(token, ctx.stops), _cut(weights, ctx.stops)
        value = [x.new_empty(len(rows), down.shape[2]) for rows in tokens]
        gate = [torch.empty_like(piece) for piece in value] if _gated(up, down) else []
        ctx.save_for_backward(x, up, down, weights, token, *value, *gate)
        return _forward(x, up, down, w, tokens, activation, gate, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weights, token, *pieces = ctx.saved_tensors
        value, gate = pieces[: len(down)], pieces[len(down) :]
        tokens, w = _cut(token, ctx.stops), _cut(weights, ctx.stops)
        frozen = not any(ctx.needs_input_grad[1:3])
        dweights = torch.zeros_like(weights)
        dx, dup, ddown = _backward(
            d, x, up, down, w, tokens, ctx.activation, gate, value, frozen, _cut(dweights, ctx.stops)
        )
        return dx, *((None, None) if frozen else (dup, ddown)), dweights, None, None, None


def _cut(rows: Tensor, stops: list[int]) -> Pieces:
    """Rows in the order of experts, cut where each expert ends; behind the last end they are nobody's."""
    return rows[: stops[-1]].tensor_split(stops[:-1])


def _gated(up: Tensor, down: Tensor) -> bool:
    return up.shape[1] != down.shape[2]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ── for compiled graphs: the same as operators ────────────────────────────────────────────────────────────────────


@torch.library.custom_op("orbit::experts", mutates_args=())
def _op(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, token: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what the backward pass needs: the rows of `gate` (none without a gate) and `value`."""
    _, gate, value = _shapes(x, up, down, weights, token, ends, activation)
    stops = ends.tolist()
    gates = _cut(gate, stops) if _gated(up, down) else []
    tokens, w = _cut(token, stops), _cut(weights, stops)
    return _forward(x, up, down, w, tokens, activation, gates, _cut(value, stops)), gate, value


@_op.register_fake
def _shapes(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, token: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    value = x.new_empty(token.shape[0], down.shape[2])
    return x.new_empty(x.shape), value.new_empty(value.shape if _gated(up, down) else (0,)), value


@torch.library.custom_op("orbit::experts_backward", mutates_args=())
def _backward_op(
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
    """The gradients of x, up, down and weights."""
    stops = ends.tolist()
    gates = _cut(gate, stops) if _gated(up, down) else []
    tokens, w = _cut(token, stops), _cut(weights, stops)
    dw = torch.zeros_like(weights)
    grads = _backward(
        d, x, up, down, w, tokens, activation, gates, _cut(value, stops), frozen, _cut(dw, stops)
    )
    return *grads, dw


@_backward_op.register_fake
def _backward_shapes(
    d: Tensor, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup, ddown = (weight.new_empty(0) if rest[-1] else torch.empty_like(weight) for weight in (up, down))
    return x.new_empty(x.shape), dup, ddown, torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    frozen = not any(ctx.needs_input_grad[1:3])
    dx, dup, ddown, dw = _backward_op(d, *ctx.saved_tensors, ctx.activation, frozen)
    return dx, *((None, None) if frozen else (dup, ddown)), dw, None, None, None


_op.register_autograd(_gradients, setup_context=_save)

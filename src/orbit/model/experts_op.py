"""Experts one after another, each on its own rows, with a backward pass of its own: `experts`.

    y_t = Σ_k w_tk·y_s,   y_s = W_down[e]·h_s,   h_s = φ(W_gate[e]·x_t) ⊙ W_up[e]·x_t     s row (t, k), e its expert

    x, y (T, D)   up (E, 2·I, D) = W_gate over W_up, or (E, I, D) without a gate: h_s = φ(W_up[e]·x_t)   down (E, D, I)
    w (T, K)   order (S,): the row k·T + t at each place, sorted by expert; those of expert e end before ends[e]

Takes every dtype and device. What is added up per token is added in at least float32. Everything between an
expert's multiplications is small enough to stay in cache, where `grouped_mm` leaves tensors as long as S: on a
CPU this is the faster way (`benchmarks/blocks.py`). On a GPU reading `ends` waits for the device, which
`grouped_mm` does not. Backward keeps x, what enters ⊙ and φ, and y_s; h is computed again.

In a compiled graph it is a single node, `torch.ops.orbit.experts`, since it depends on the values of `ends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from orbit.model.activation import ACTIVATIONS

__all__ = ["experts"]


def experts(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor, activation: str
) -> Tensor:
    """y (T, D) of the module's legend; differentiable, once, by x, up, down and weights."""
    if torch.compiler.is_compiling():
        return torch.ops.orbit.experts(x, up, down, weights, order, ends, activation)[0]
    return _Experts.apply(x, up, down, weights, order, ends, activation)


Pieces = Sequence[Tensor]  # one an expert


def _forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    stops: list[int],
    activation: str,
    value: Pieces,
    gate: Pieces,
) -> tuple[Tensor, Tensor, Pieces, Pieces]:
    """y, y_S, φ and what enters W_down; fills `value` with W_up·x and, of gated experts, `gate` with W_gate·x."""
    phi, inner = ACTIVATIONS[activation].forward, down.shape[2]
    y_S = x.new_empty(len(order), x.shape[1])
    y_S[stops[-1] :] = 0
    p, h = [], []
    for e, (rows, y_e) in enumerate(zip(_cut(order % max(len(x), 1), stops), _cut(y_S, stops), strict=True)):
        x_e = x.index_select(0, rows)
        torch.mm(x_e, up[e, -inner:].T, out=value[e])
        if gate:
            torch.mm(x_e, up[e, :inner].T, out=gate[e])
        p.append(phi(gate[e] if gate else value[e]))
        h.append(p[e] * value[e] if gate else p[e])
        torch.mm(h[e], down[e].T, out=y_e)
    place = _places(order, weights)
    w = weights.masked_fill(place >= stops[-1], 0).to(x.dtype)
    return F.embedding_bag(place, y_S, mode="sum", per_sample_weights=w), y_S, p, h


def _backward(
    d: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    stops: list[int],
    activation: str,
    y_S: Tensor,
    value: Pieces,
    gate: Pieces,
    p: Pieces,
    h: Pieces,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, up and down (both empty if `frozen`) and weights."""
    phi, inner = ACTIVATIONS[activation], down.shape[2]
    dup, ddown = (weight.new_empty(0) if frozen else torch.empty_like(weight) for weight in (up, down))
    token, place = order % max(len(x), 1), _places(order, weights)
    d_S = d.index_select(0, token)
    d_S[stops[-1] :] = 0
    dw = torch.linalg.vecdot(d_S, y_S).to(weights.dtype)[place]
    d_S.mul_(weights.T.reshape(-1)[order].to(d.dtype)[:, None])
    for e, (rows, d_e) in enumerate(zip(_cut(token, stops), _cut(d_S, stops), strict=True)):
        dh = d_e @ down[e]
        if not frozen:
            torch.mm(d_e.T, h[e], out=ddown[e])
        dvalue = dh * p[e] if gate else phi.backward(dh, value[e])
        dx_e = torch.mm(dvalue, up[e, -inner:], out=d_e)
        if gate:
            dgate = phi.backward(dh.mul_(value[e]), gate[e])
            dx_e.addmm_(dgate, up[e, :inner])
        if not frozen:
            x_e = x.index_select(0, rows)
            torch.mm(dvalue.T, x_e, out=dup[e, -inner:])
            if gate:
                torch.mm(dgate.T, x_e, out=dup[e, :inner])
    d_S[stops[-1] :] = 0
    return F.embedding_bag(place, d_S, mode="sum"), dup, ddown, dw


class _Experts(torch.autograd.Function):
    """Keeps its rows in pieces: on a CPU, memory freshly mapped for long tensors costs more than their use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
        weights, order, ends, activation = rest
        ctx.stops, ctx.activation = ends.tolist(), activation
        value = [x.new_empty(len(rows), down.shape[2]) for rows in _cut(order, ctx.stops)]
        gate = [torch.empty_like(piece) for piece in value] if _gated(up, down) else []
        y, y_S, p, h = _forward(x, up, down, weights, order, ctx.stops, activation, value, gate)
        ctx.save_for_backward(x, up, down, weights, order, y_S, *value, *p, *h, *gate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, weights, order, y_S, *pieces = ctx.saved_tensors
        count = len(ctx.stops)
        value, p, h, gate = (pieces[start : start + count] for start in range(0, 4 * count, count))
        frozen = not any(ctx.needs_input_grad[1:3])
        dx, dup, ddown, dw = _backward(
            d, x, up, down, weights, order, ctx.stops, ctx.activation, y_S, value, gate, p, h, frozen
        )
        return dx, *((None, None) if frozen else (dup, ddown)), dw, None, None, None


def _cut(rows: Tensor, stops: list[int]) -> Pieces:
    """Rows in the order of experts, cut where each expert ends; behind the last end they are nobody's."""
    return rows[: stops[-1]].tensor_split(stops[:-1])


def _places(order: Tensor, weights: Tensor) -> Tensor:
    """(T, K): where the rows of each token stand."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place.view(weights.T.shape).T.contiguous()


def _gated(up: Tensor, down: Tensor) -> bool:
    return up.shape[1] != down.shape[2]


# ── for compiled graphs: the same as operators ────────────────────────────────────────────────────────────────────


@torch.library.custom_op("orbit::experts", mutates_args=())
def _op(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, and what the backward pass needs: y_S and the rows of `value`, φ and `gate` (none without a gate)."""
    _, _, value, p, gate = _shapes(x, up, down, weights, order, ends, activation)
    stops = ends.tolist()
    gates = _cut(gate, stops) if _gated(up, down) else []
    y, y_S, pieces, _ = _forward(x, up, down, weights, order, stops, activation, _cut(value, stops), gates)
    torch.cat(tuple(pieces), out=p[: stops[-1]])
    return y, y_S, value, p, gate


@_op.register_fake
def _shapes(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value = x.new_empty(order.shape[0], down.shape[2])
    gate = value.new_empty(value.shape if _gated(up, down) else (0,))
    return x.new_empty(x.shape), x.new_empty(order.shape[0], x.shape[1]), value, torch.empty_like(value), gate


@torch.library.custom_op("orbit::experts_backward", mutates_args=())
def _backward_op(
    d: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    y_S: Tensor,
    value: Tensor,
    p: Tensor,
    gate: Tensor,
    activation: str,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, up, down and weights."""
    stops = ends.tolist()
    gates = _cut(gate, stops) if _gated(up, down) else []
    h = _cut(p if frozen or not gates else p * value, stops)
    pieces = _cut(value, stops), gates, _cut(p, stops), h
    return _backward(d, x, up, down, weights, order, stops, activation, y_S, *pieces, frozen)


@_backward_op.register_fake
def _backward_shapes(
    d: Tensor, x: Tensor, up: Tensor, down: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup, ddown = (weight.new_empty(0) if rest[-1] else torch.empty_like(weight) for weight in (up, down))
    return x.new_empty(x.shape), dup, ddown, torch.empty_like(weights)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    frozen = not any(ctx.needs_input_grad[1:3])
    dx, dup, ddown, dw = _backward_op(d, *ctx.saved_tensors, ctx.activation, frozen)
    return dx, *((None, None) if frozen else (dup, ddown)), dw, None, None, None


_op.register_autograd(_gradients, setup_context=_save)

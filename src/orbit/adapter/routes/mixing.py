"""Several tasks at one layer, for any kind of layer.

    y = base + Σ_t w_t·(y_t − base)

A number per task: each y_t is computed on the whole batch. One task per row: the rows are sorted by task, each
task computes its own rows and no others, and they are put back in order; so the layer's own product is done once.
In a compiled graph, whose shapes may not depend on who got how many rows, each y_t is computed on the whole
batch there too, and every row takes its own.
What is batched is found by the first axis of the first tensor argument: every tensor among the arguments and
outputs whose first axis has that length is taken apart with it.

Kinds whose y_t − base is a short product (`linear.py`) do better.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from orbit.adapter.errors import ScalingsError

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft
    from orbit.adapter.routes.plan import Mix


def mixed(layer: Graft, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int = 0) -> Any:
    """The output of `layer` for these arguments under several tasks.

    Args:
        axis: the batch axis of tensors in arguments and outputs.

    Raises:
        RouteError: the batch does not fit the route's rows. ScalingsError: weights per position, where an output is
            not (batch, sequence, …).
    """
    if mix.rows is not None:
        first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        mix = layer.fitted(mix, first, axis)
        if not torch.compiler.is_compiling():
            return _per_row(layer, mix, args, kwargs, axis, first.shape[axis])
    base = layer.base(*args, **kwargs)
    return weighted(layer, base, (layer.adapted(slot, *args, **kwargs) for slot in mix.slots), mix, axis)


def weighted(layer: Graft, base: Any, each: Iterable[Any], mix: Mix, axis: int = 0) -> Any:
    """base + Σ_t w_t·(y_t − base) over the outputs y_t of the mix's tasks.

    Raises:
        ScalingsError: weights per position, where an output is not (batch, sequence, …).
    """
    if mix.weights.dim() == 3:
        _refuse_misfit(layer, base, mix.weights, axis)
    total = base
    for index, one in enumerate(each):
        weight = mix.weights[..., index]
        if mix.rows is not None:
            total = tree_map(lambda t, y, w=weight: _chosen(w, y, t, axis), total, one)
        else:
            total = tree_map(lambda t, y, b, w=weight: _added(w, y, b, t, axis), total, one, base)
    return total


def _per_row(
    layer: Graft, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int, batch: int
) -> Any:
    assert mix.rows is not None

    def take(value: Any, rows: Tensor) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == batch
        return value.index_select(axis, rows) if batched else value

    parts, order = [], []
    for slot, rows in zip((*mix.slots, None), mix.rows, strict=True):
        if not len(rows):
            continue
        own_args, own_kwargs = tree_map(lambda value, rows=rows: take(value, rows), (args, kwargs))
        whole = layer.base if slot is None else lambda *a, s=slot, **k: layer.adapted(s, *a, **k)
        parts.append(whole(*own_args, **own_kwargs))
        order.append(rows)
    if len(parts) == 1:
        return parts[0]
    back = torch.cat(order).argsort()
    return tree_map(
        lambda *ys: torch.cat(ys, axis).index_select(axis, back) if isinstance(ys[0], Tensor) else ys[0],
        *parts,
    )


def _refuse_misfit(layer: Graft, outputs: Any, weights: Tensor, axis: int) -> None:
    for y in tree_leaves(outputs):
        if (
            isinstance(y, Tensor)
            and y.is_floating_point()
            and y.transpose(0, axis).shape[:2] != weights.shape[:2]
        ):
            raise ScalingsError(
                f"scalings for (batch, sequence) = {tuple(weights.shape[:2])} do not fit its output {tuple(y.shape)}",
                layer,
            )


def _chosen(weight: Tensor, one: Any, other: Any, axis: int) -> Any:
    """Rows of weight 1 from `one`, the rest from `other`."""
    if not isinstance(one, Tensor):
        return other
    return torch.where(_along(weight, one, axis) > 0, one, other)


def _added(weight: Tensor, one: Any, base: Any, total: Any, axis: int) -> Any:
    """total + w·(one − base) of floating tensors."""
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return total
    return total + _along(weight, one, axis).to(one.dtype) * (one - base)


def _along(weight: Tensor, output: Tensor, axis: int) -> Tensor:
    """A weight (), per row (batch,) or per position (batch, sequence), shaped to multiply `output`."""
    if weight.dim() == 0:
        return weight
    if weight.dim() == 2:
        weight, axis = weight.transpose(0, axis), 0
    return weight.reshape(*[1] * axis, *weight.shape, *[1] * (output.dim() - weight.dim() - axis))

"""Several tasks at one layer, for any kind of layer.

    y = base + Σ_t w_t·(y_t − base)

A number per task: each y_t is computed on the whole batch. One task per row: the rows are sorted by task, each
task computes its own rows and no others, and they are put back in order; so the layer's own product is done once.
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

from orbit.adapter.errors import RouteError

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft
    from orbit.adapter.plan import Mix


def mixed(layer: Graft, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int = 0) -> Any:
    """The output of `layer` for these arguments under several tasks.

    Args:
        axis: the batch axis of tensors in arguments and outputs.

    Raises:
        RouteError: the batch does not fit the route's rows; or weights per position, where an output is not
            (batch, sequence, …).
    """
    if mix.rows is not None:
        return _per_row(layer, mix, args, kwargs, axis)
    base = layer.base(*args, **kwargs)
    return weighted(base, (layer.adapted(slot, *args, **kwargs) for slot in mix.slots), mix)


def weighted(base: Any, each: Iterable[Any], mix: Mix) -> Any:
    """base + Σ_t w_t·(y_t − base) over the outputs y_t of the mix's tasks.

    Raises:
        RouteError: weights per position, where an output is not (batch, sequence, …).
    """
    total = base
    for index, one in enumerate(each):
        weight = mix.weights[..., index]
        total = tree_map(
            lambda t, y, b, w=weight: t + _broadcast(w, y) * (y - b) if _floats(y) else t, total, one, base
        )
    return total


def _per_row(layer: Graft, mix: Mix, args: tuple[Any, ...], kwargs: dict[str, Any], axis: int) -> Any:
    batch = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)).shape[axis]
    mix = mix.fitted(batch)
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


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _broadcast(weight: Tensor, output: Tensor) -> Tensor:
    """A number, or (batch, sequence), shaped to multiply `output`."""
    if weight.dim() == 0:
        return weight.to(output.dtype)
    if output.shape[: weight.dim()] != weight.shape:
        raise RouteError(
            f"scalings for (batch, sequence) = {tuple(weight.shape)} do not fit a layer's output {tuple(output.shape)}"
        )
    return weight.to(output.dtype).reshape(*weight.shape, *[1] * (output.dim() - weight.dim()))

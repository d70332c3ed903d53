"""Which rows a call has, and whether a layer's input still has them.

One task per row is only right where row i of a layer's input belongs to row i of the model's. The model's call
shows its batch B and the lengths T of its inputs. A layer may then get

    (B, …)        the batch
    (B·T, …)      its tokens, flattened: up to two axes
    (k·B, …, …)   three axes or more: rows taken apart (heads, windows), neighbours staying together

and anything else is refused: tokens that a mixture of experts gathered, images cut into patches, a sequence
before its batch. What no shape tells: a gathered selection that happens to have B or B·T rows, an own
reordering of the rows, and a transposition where T = B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from orbit.adapter.errors import RouteError


class Batch(NamedTuple):
    """The rows of a running call.

    Attributes:
        rows: B.
        lengths: the second axes of its inputs.
    """

    rows: int
    lengths: frozenset[int]

    def check(self, shape: torch.Size, axis: int) -> None:
        """RouteError unless a layer's input of this shape, with the batch on `axis`, has this batch's rows."""
        found = shape[axis]
        if found == self.rows or self._is_taken_apart(found, shape, axis):
            return
        raise RouteError(
            f"the call has {self.rows} rows, and an adapted layer was given {tuple(shape)}, whose axis {axis} is "
            "not these rows one after the other; with one task per row exclude this layer from the task, or run "
            "the rows of each task by themselves"
        )

    def _is_taken_apart(self, found: int, shape: torch.Size, axis: int) -> bool:
        if len(shape) <= 2:
            return any(found == self.rows * length for length in self.lengths)
        transposed = axis == 0 and shape[1] == self.rows and found in self.lengths
        return found % self.rows == 0 and not transposed


def batch_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, order: str
) -> Batch | None:
    """The batch with which `model` is called, or None if it cannot be told.

    Args:
        rows: how many the route has.
        order: where the model has its batch, from `order_of`.

    Raises:
        RouteError: it is no multiple of the route's rows, or the model has its batch on the second axis.
    """
    if order == "sequence first":
        raise RouteError(
            f"{type(model).__name__} holds a Transformer layer made with batch_first=False, so its rows are not on "
            "the first axis; one task per row needs batch_first=True"
        )
    main = [kwargs[name] for name in _MAIN if isinstance(kwargs.get(name), Tensor)]
    leaves = [t for t in (*main, *tree_leaves((args, kwargs))) if isinstance(t, Tensor) and t.dim()]
    if order == "unknown" or not leaves:
        return None
    size = next((t.shape[0] for t in leaves if t.dim() > 1), leaves[0].shape[0])
    if size % rows:
        raise RouteError(
            f"the route has one task for each of {rows} rows, and {type(model).__name__} was called with a batch "
            f"of {size}; give one task per row, or a divisor of the batch whose tasks stand for neighbouring rows"
        )
    return Batch(size, frozenset(t.shape[1] for t in leaves if t.dim() > 1 and t.shape[0] == size))


_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids")  # before pixel_values, say, which are patches


def order_of(model: nn.Module) -> str:
    """Where the model's parts of torch have their batch: "batch first", "sequence first" or "unknown"."""
    parts = [module for module in model.modules() if vars(module).get("batch_first") is False]
    if not parts:
        return "batch first"
    for module in model.modules():
        attention = getattr(module, "self_attn", None)
        whole = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        adapted = any("_orbit_route" in vars(child) for child in module.children() if child is not attention)
        if whole and attention in parts and adapted:
            return "sequence first"
    return "unknown"

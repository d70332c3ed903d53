"""How many numbers a model is made of."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.parameter import is_lazy

from orbit.model.errors import ShapeError

__all__ = ["count_params"]


def count_params(model: nn.Module, trainable_only: bool = False) -> int:
    """The number of elements of the model's parameters; a tied one counts once.

    A weight that bitsandbytes packs into 4 bits counts as what it stands for. Under FSDP2 the whole model counts, not
    this rank's piece.

    Args:
        trainable_only: only of those that train.

    Raises:
        ShapeError: a lazy parameter, which has no shape before the first batch.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2).requires_grad_(False))
    >>> count_params(model), count_params(model, trainable_only=True)
    (23, 15)
    """
    total = 0
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ShapeError(
                f"{name} has no shape yet, and no number of elements: run model(example) once first"
            )
        if parameter.requires_grad or not trainable_only:
            packed_from = getattr(getattr(parameter, "quant_state", None), "shape", None)
            total += math.prod(parameter.shape if packed_from is None else packed_from)
    return total

"""Two states, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def difference(left: Any, right: Any, place: str = "state") -> str | None:
    """The first place where two nested states differ, in type, length, or any bit of a tensor; None if nowhere.

    >>> difference({"a": [1, torch.ones(2)]}, {"a": [1, torch.zeros(2)]})
    "state['a'][1]"
    """
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        return None if same and torch.equal(_bits(left), _bits(right)) else place
    if type(left) is not type(right):
        return place
    if isinstance(left, Mapping):
        if left.keys() != right.keys():
            return f"the keys of {place}"
        pairs = [(left[key], right[key], f"{place}[{key!r}]") for key in left]
    elif isinstance(left, list | tuple):
        if len(left) != len(right):
            return f"the length of {place}"
        pairs = [(a, b, f"{place}[{index}]") for index, (a, b) in enumerate(zip(left, right, strict=True))]
    else:
        return None if left == right or (left != left and right != right) else place
    return next((found for pair in pairs if (found := difference(*pair)) is not None), None)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, so that a NaN equals itself and 0 does not equal −0."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

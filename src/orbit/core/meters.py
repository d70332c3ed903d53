"""Averages that stay where they were computed, with one host sync a flush.

Reading a loss with `.item()` in the hot loop makes the host wait for the device in every batch. Here a value is
only appended to a list; `flush()` stacks all values of all names into one tensor and copies that once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orbit.core.nested import as_number
from orbit.core.ranks import everyones

_COMPACT = (
    1024  # values kept per name before they are folded into one sum, so that an epoch's memory is bounded
)


class Averages:
    """Weighted means of named scalars: Σ wᵢ·vᵢ / Σ wᵢ. A value of weight 0 contributes nothing, NaN or not.

    >>> averages = Averages()
    >>> averages.add({"loss": torch.tensor(1.0)}); averages.add({"loss": 4.0}, weight=2.0)
    >>> averages.flush()
    {'loss': 3.0}
    """

    def __init__(self) -> None:
        self._values: dict[tuple[str, ...], list[tuple[Any, Any]]] = {}

    def add(self, records: Mapping[str, Any], weight: float | Tensor = 1.0) -> None:
        """Append nested `records` of numbers or one-element tensors. TypeError names a record that is neither."""
        self._add(records, weight, ())

    def _add(self, records: Mapping[str, Any], weight: Any, path: tuple[str, ...]) -> None:
        for key, value in records.items():
            name = (*path, key)
            if isinstance(value, Mapping):
                self._add(value, weight, name)
                continue
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise TypeError(
                        f"record {'.'.join(name)!r} is no number: a tensor of shape {tuple(value.shape)}; "
                        "log a float or a 0-d tensor"
                    )
                value = value.detach()
            else:
                value = as_number(value, ".".join(name))
            column = self._values.setdefault(name, [])
            column.append((value, weight))
            if len(column) > _COMPACT:
                column[:] = [_fold(column)]

    def flush(self) -> dict[str, Any]:
        """The means so far as a nested dict of floats; then start again. One host sync."""
        result = self.peek()
        self._values.clear()
        return result

    def peek(self) -> dict[str, Any]:
        """The means so far; nothing is forgotten. NaN where all weights were 0. One host sync."""
        result: dict[str, Any] = {}
        means = _to_host([_fold(column)[0] for column in self._values.values()])
        for (*parents, key), mean in zip(self._values, means, strict=True):
            node = result
            for parent in parents:
                node = node.setdefault(parent, {})
            node[key] = mean
        return result

    def over_ranks(self) -> None:
        """Take in what every other rank has, so that all have the same means. All ranks must call it."""
        self.take(everyones(self.state_dict()))

    def take(self, parts: list[list[Any]]) -> None:
        """Be what several `state_dict()`s are together."""
        self._values.clear()
        for part in parts:
            for name, column in part:
                self._values.setdefault(tuple(name), []).extend((value, weight) for value, weight in column)

    def state_dict(self) -> list[Any]:
        """Every name with its values and weights, plain, so that a resumed mean has the same bits. One host sync."""
        sizes = [len(column) for column in self._values.values()]
        flat = iter(_to_host([part for column in self._values.values() for pair in column for part in pair]))
        return [
            [list(name), [[next(flat), next(flat)] for _ in range(size)]]
            for name, size in zip(self._values, sizes, strict=True)
        ]

    def load_state_dict(self, state: list[Any]) -> None:
        """Go on from a `state_dict()`."""
        self._values = {tuple(name): [(value, weight) for value, weight in column] for name, column in state}


def _to_host(numbers: list[Any]) -> list[float]:
    """Numbers and one-element tensors as floats, all in one copy."""
    if not numbers:
        return []
    device = next(
        (n.device for n in numbers if isinstance(n, Tensor) and n.device.type != "cpu"), torch.device("cpu")
    )
    return _vector(tuple(numbers), device).tolist()


def _fold(column: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """One (mean, weight) for many, on the device of the values."""
    if len(column) == 1:
        return column[0]
    values, weights = zip(*column, strict=True)
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    value, weight = _vector(values, device), _vector(weights, device)
    total = weight.sum()
    return torch.where(weight > 0, value * weight, 0.0).sum() / total, total


def _vector(numbers: tuple[Any, ...], device: torch.device) -> Tensor:
    if any(isinstance(n, Tensor) for n in numbers):
        return torch.stack(
            [torch.as_tensor(n, dtype=torch.float64, device=device).reshape(()) for n in numbers]
        )
    return torch.tensor(numbers, dtype=torch.float64, device=device)

"""Nested containers of tensors and of numbers: move them, map over them, average them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def map_nested_tensor(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply `fn` to every tensor in nested dicts, lists, tuples and named tuples; leave the rest as it is.

    Containers keep their type: named tuples, defaultdicts and Hugging Face `BatchEncoding`s too.

    >>> map_nested_tensor(lambda t: t + 1, {"x": torch.zeros(2), "y": [torch.ones(1), "text"]})
    {'x': tensor([1., 1.]), 'y': [tensor([2.]), 'text']}
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Mapping):
        items = {key: map_nested_tensor(fn, item) for key, item in value.items()}
        if isinstance(value, defaultdict):
            return defaultdict(value.default_factory, items)
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_nested_tensor(fn, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_nested_tensor(fn, item) for item in value)
    return value


def key_average(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average numbers over a list of nested dicts, key by key; a key is averaged over the dicts that have it.

    Numbers and 0-d tensors become floats. Raises TypeError naming the key of anything else, and ValueError
    where one dict holds a number and another a dict.

    >>> key_average([{"loss": 0.5, "metrics": {"acc": 0.8}}, {"loss": 1.5, "metrics": {"acc": 0.9}}])
    {'loss': 1.0, 'metrics': {'acc': 0.8500000000000001}}
    """
    return _average(records, "")


def _average(records: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record.items():
            columns.setdefault(key, []).append(value)
    result: dict[str, Any] = {}
    for key, values in columns.items():
        name = f"{path}{key}"
        nested = [isinstance(value, Mapping) for value in values]
        if all(nested):
            result[key] = _average(values, f"{name}.")
        elif any(nested):
            raise ValueError(f"record {name!r} is a number in one place and a dict in another")
        else:
            result[key] = sum(as_number(value, name) for value in values) / len(values)
    return result


def flat(records: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested records by their names joined with "/".

    >>> dict(flat({"loss": 1.0, "val": {"acc": 0.5}}))
    {'loss': 1.0, 'val/acc': 0.5}
    """
    for name, value in records.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def as_number(value: Any, name: str) -> float:
    """`value` as a float. TypeError that names the record unless it is a number or a one-element tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.detach())
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError):
        shown = tuple(value.shape) if isinstance(value, Tensor) else value
        raise TypeError(
            f"record {name!r} is no number: {type(value).__name__} {shown!r}; log a float or a 0-d tensor"
        ) from None
    raise TypeError(f"record {name!r} is no number: {value!r}; log a float or a 0-d tensor")


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor found in nested containers, depth first, or None."""
    if isinstance(value, Tensor):
        return value
    children = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    )
    for child in children:
        found = first_tensor(child)
        if found is not None:
            return found
    return None


def count_samples(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor (1 where there is none)."""
    tensor = first_tensor(batch)
    return int(tensor.shape[0]) if isinstance(tensor, torch.Tensor) and tensor.ndim > 0 else 1

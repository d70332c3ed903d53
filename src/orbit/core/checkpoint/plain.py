"""What a checkpoint may hold: tensors and plain values, so that it loads with `weights_only=True`."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor

from orbit.core.checkpoint.errors import CheckpointError

_PLAIN = (Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def check_plain(value: Any, place: str = "") -> None:
    """CheckpointError naming the place of what is neither."""
    if isinstance(value, _PLAIN) and (type(value) in _PLAIN or isinstance(value, Tensor)):
        return
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            check_plain(key, f"{place}[{key!r}]")
            check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            check_plain(item, f"{place}[{index}]")
    else:
        raise CheckpointError(
            f"the state at {place or 'its top'} is a "
            f"{type(value).__module__}.{type(value).__qualname__}: checkpoints hold tensors and plain "
            "values only, so that they load with weights_only=True; save a tensor, number, string, list or dict"
        )

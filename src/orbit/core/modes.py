"""Training flags that come back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Every module of the models has its own training flag again on every way out, also where they differ.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    >>> with modes_kept(model):
    ...     _ = model.eval()
    >>> [layer.training for layer in model]
    [True, False]
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

"""Training flags that come back: `modes_kept` around whatever changes them, `evaluating` where nothing is to train."""

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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the whole model is in evaluation mode; then every module is in its own again.

    A model that evaluates already is not touched: its layers keep what they have derived from their weights.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     inside = [layer.training for layer in model]
    >>> inside, [layer.training for layer in model]
    ([False, False], [True, False])
    """
    with modes_kept(model):
        if any(module.training for module in model.modules()):
            model.eval()
        yield

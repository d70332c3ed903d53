"""Which tensors of a model came from a file, so that nothing starts them afresh by mistake.

The note is kept by each layer, under the names of its own tensors: it goes along with `.to()`, copies and pickles.
Whoever loads weights writes it; `model.auto_initialize` reads it.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_NOTE = "_orbit_loaded"


def mark_loaded(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Note that these parameters and buffers (None: all) hold what was loaded.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> mark_loaded(model, ["1.weight"])
    >>> loaded_names(model[0]), loaded_names(model[1])
    (frozenset(), frozenset({'weight'}))
    """
    for path, layer in model.named_modules(remove_duplicate=False):
        own = (*layer._parameters, *layer._buffers)
        new = {name for name in own if names is None or (f"{path}.{name}" if path else name) in names}
        if new:
            layer.__dict__[_NOTE] = loaded_names(layer) | new


def loaded_names(layer: nn.Module) -> frozenset[str]:
    """The layer's own parameters and buffers that hold what was loaded."""
    return layer.__dict__.get(_NOTE, frozenset())

"""A model's own modules, apart from what hangs on them.

An adapter's tensors lie in small modules beside the weights that they adapt, and a router beside the whole model. They
are in `named_modules()` like everything else, and no part of the model that a name such as "encoder" means.
"""

from __future__ import annotations

from torch import nn


class Attached:
    """A mixin for modules that hang on a model and are no part of it; all below them are none either."""


def tree(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module | None]]:
    """Every module of the model but attached ones, each once, by name; and each one's parent.

    >>> class Adapter(nn.Linear, Attached): ...
    >>> modules, parents = tree(nn.Sequential(nn.Linear(2, 2), nn.Sequential(Adapter(2, 2), nn.ReLU())))
    >>> list(modules), parents["1.1"] is modules["1"]
    (['', '0', '1', '1.1'], True)
    """
    modules: dict[str, nn.Module] = {}
    parents: dict[str, nn.Module | None] = {}
    seen: set[nn.Module] = set()
    left: list[tuple[str, nn.Module, nn.Module | None]] = [("", model, None)]
    while left:
        name, module, parent = left.pop()
        if module not in seen and not isinstance(module, Attached):
            seen.add(module)
            modules[name], parents[name] = module, parent
            children = [
                (f"{name}.{key}" if name else key, child, module) for key, child in module.named_children()
            ]
            left.extend(reversed(children))
    return modules, parents

"""LoRA+: B learns faster than A.

    lr_A = lr,    lr_B = ratio·lr

A and the rest (magnitudes, gates, whole modules, an unlocked head) keep the rate lr. B starts at zero and its
gradient is smaller by the width of the layer than what a step of A changes, so that one rate for both lets wide
layers learn too slowly. Source: Hayou et al. 2024 (arXiv 2402.12354), which recommends a ratio near 16.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from orbit.adapter.errors import ConfigError
from orbit.adapter.inject import adapter_parameters, task_owners
from orbit.adapter.owners import Up


def param_groups(
    model: nn.Module,
    name: str | None = None,
    *,
    lr: float,
    b_ratio: float = 16.0,
    weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: what trains at `lr`, but B at `lr·b_ratio`.

    Args:
        model: a model with tasks.
        name: the task of which the parameters are wanted; None: everything that trains in the model.
        lr: learning rate of A and the rest.
        b_ratio: that of B over that of A.
        weight_decay: of both groups; None leaves it to the optimizer.

    Raises:
        TaskError: no such task. ConfigError: a rate or ratio that is not positive; nothing trains.

    >>> from orbit.adapter import AdapterConfig, inject
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> _ = inject(model, AdapterConfig(r=2))
    >>> [(group["lr"], len(group["params"])) for group in param_groups(model, lr=1e-4)]
    [(0.0001, 1), (0.0016, 1)]
    """
    for key, value in (("lr", lr), ("b_ratio", b_ratio)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{key}={value!r}: it must be a positive number")
    fast = {
        id(parameter)
        for owner in task_owners(model, name)
        for module in owner.modules()
        if isinstance(module, Up)
        for parameter in module.parameters()
    }
    found = model.parameters() if name is None else adapter_parameters(model, name).values()
    train = [parameter for parameter in found if parameter.requires_grad]
    if not train:
        raise ConfigError(
            f"nothing trains in {'the model' if name is None else f'task {name!r}'}: see set_trainable"
        )
    slow = [parameter for parameter in train if id(parameter) not in fast]
    quick = [parameter for parameter in train if id(parameter) in fast]
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [{"params": slow, "lr": lr, **decay}, {"params": quick, "lr": lr * b_ratio, **decay}]
    return [group for group in groups if group["params"]]

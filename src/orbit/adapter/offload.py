"""Weights that accelerate keeps elsewhere between forwards.

An offloaded layer's weight is on the meta device and comes back for the length of its forward. Its adapters
live on the device where the forward runs: a matrix on the meta device would multiply to garbage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.adapter.errors import GraftError

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft


def offload_hook(layer: nn.Module) -> Any | None:
    """The accelerate hook that offloads this layer's own weight, or None."""
    hook = layer.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            return one
    return None


def execution_device(layer: Graft) -> torch.device:
    """The device on which the layer's forward runs.

    Raises:
        GraftError: the weight is on the meta device and nothing brings it back.
    """
    module, name = layer.home()
    weight: torch.Tensor = getattr(module, name)
    if not weight.is_meta:
        return weight.device
    hook = offload_hook(module)
    if hook is None:
        raise GraftError("its weight is on the meta device; load the weights before adapting the model")
    device = hook.execution_device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


@contextmanager
def weights_at_hand(layer: Graft) -> Iterator[None]:
    """Inside, the weight of an offloaded layer is on its execution device."""
    module, name = layer.home()
    weight = module._parameters.get(name)
    hook = offload_hook(module) if weight is not None and weight.is_meta else None
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def refuse_meta(adapter: Tensor, other: Tensor) -> None:
    """GraftError if an adapter was offloaded: torch would multiply by it without a word, and return garbage."""
    if adapter.is_meta and not other.is_meta:
        raise GraftError("an adapter is on the meta device: offload the model before injecting, not after")


def refuse_preloaded(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise GraftError if a layer of these is brought back by a module above it, which would look for its tasks too."""
    paths = list(paths)
    for above, module in model.named_modules():
        if getattr(offload_hook(module), "place_submodules", False):
            for path in paths:
                if not above or path == above or path.startswith(above + "."):
                    raise GraftError(
                        f"layer {path!r} is offloaded with all of {above or 'the model'!r} (preload_module_classes), "
                        "and the hook would look for the tasks' tensors where it keeps the weights; leave that class "
                        "out, or exclude the layer"
                    )

"""What an injection does to which module: all that a config names, in the model's order.

    targets        low-rank owners in every layer, or the module of a registered constructor in its place
    parameters     low-rank owners at parameters of a module of any kind
    save_modules   a copy of the module

Nothing below a module that is replaced or run as a whole is adapted by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import TargetError
from orbit.adapter.experts import resolve_parameters
from orbit.adapter.graft import Graft
from orbit.adapter.kinds import wrapper_of
from orbit.adapter.modules import resolve_saved, saved, wrapped
from orbit.adapter.owners import AnySlot
from orbit.adapter.targets import at_or_below, resolve, tree
from orbit.adapter.whole import WholeGraft


class Planned(NamedTuple):
    """A module to adapt, and what makes its owners for the task once it is grafted."""

    module: nn.Module
    make: Callable[[Graft], AnySlot]


def plan_injection(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, Planned], dict[str, str]]:
    """The modules that a config adapts, and the layers in reach that it leaves out, with the reason; by dotted name.

    Raises:
        TargetError: a name that matches nothing or something that cannot be adapted; nothing to adapt.
    """
    layers, skipped = ({}, {}) if config.targets == () else resolve(model, config.targets, config.exclude)
    sites = resolve_parameters(model, config.parameters)
    copies = resolve_saved(model, config.save_modules)
    found: dict[str, Planned] = {}
    for path, layer in layers.items():
        make = wrapped if wrapper_of(layer) is not None else partial(_low_rank, config=config.at(path))
        found[path] = Planned(layer, make)
    for path, (module, names) in sites.items():
        at = {name: config.at(f"{path}.{name}" if path else name) for name in names}
        found[path] = Planned(module, partial(_at_parameters, configs=at))
    for path in [path for path, (module, _) in found.items() if _replaced_above(path, found)]:
        del found[path]
        skipped[path] = "it lies within a module that is adapted as a whole"
    for path, module in copies.items():
        if any(other != path and at_or_below(path, [other]) for other in (*copies, *found)):
            raise TargetError(f"save_modules names {path!r}, which lies within a module that is adapted as a whole")
        for other in [other for other in found if at_or_below(other, [path])]:
            if other in sites:
                raise TargetError(f"{path!r} is trained whole, so parameters of {other!r} cannot be adapted too")
            del found[other]
            skipped[other] = "it is trained whole" if other == path else f"it lies within {path}, trained whole"
        found[path] = Planned(module, saved)
        skipped.pop(path, None)
    for path, module in tree(model)[0].items():
        if isinstance(module, nn.MultiheadAttention) and path in found:
            skipped.pop(f"{path}.out_proj" if path else "out_proj", None)
    order = [path for path in tree(model)[0] if path in found]
    return {path: found[path] for path in order}, skipped


def _replaced_above(path: str, found: dict[str, Planned]) -> bool:
    above = [other for other in found if other != path and at_or_below(path, [other])]
    return any(wrapper_of(found[other].module) is not None for other in above)


def _low_rank(layer: Graft, config: object) -> AnySlot:
    return layer.new_slot(config)  # type: ignore[arg-type]


def _at_parameters(layer: Graft, configs: object) -> AnySlot:
    assert isinstance(layer, WholeGraft)
    return layer.new_whole(configs)  # type: ignore[arg-type]

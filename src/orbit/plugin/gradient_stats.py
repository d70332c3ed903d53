"""How large the gradients are, layer by layer, and how far a step moves the weights.

    gradients/norm               ‖g‖ over everything that trains
    gradients/layer/<name>       ‖g‖ of one layer
    gradients/update/<name>      ‖Δw‖/‖w‖ of one layer, Δw what the step changed

g is the gradient that the optimizer gets, after clipping (`step_info["grad_norm"]` is the norm before it). A layer
whose norm is far below its neighbours' does not learn; a ratio of about 1e-3 is healthy for Adam-like optimizers, far
above it training is unstable, far below it slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.ranks import shards
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class GradientStats(Plugin):
    """Give these figures to `trainer.log` every `interval` optimizer steps, with one copy to the host each time.

    Args:
        interval: steps, >= 1.
        per_layer: True names layers by the module that holds the parameters; a number, >= 1, by so many parts of the
            name ("model.layers.7" is 3); False gives the norm of the whole alone.
        updates: also compare the weights before and after the step, which holds a copy of all that trains for the
            length of that step.

    Attributes:
        last: the newest figures, as they were logged.
    """

    priority = Plugin.METER

    def __init__(self, interval: int = 100, per_layer: bool | int = True, updates: bool = True) -> None:
        self.interval = check_interval("GradientStats", interval)
        if not isinstance(per_layer, bool | int) or (per_layer is not False and per_layer < 1):
            raise ValueError(
                f"GradientStats(per_layer={per_layer!r}): give True, False or a number of name parts >= 1"
            )
        self.per_layer, self.updates = per_layer, updates
        self.last: dict[str, Any] = {}
        self._measured: list[nn.Parameter] = []
        self._layers: list[str] = []  # of each of them
        self._before: list[Tensor] = []
        self._gradients: Tensor | None = None  # their norms, (P,)
        self._ratios: tuple[Tensor, Tensor] | None = None  # norms of updates and of weights, (P,) each

    def on_before_optimizer_step(self, trainer: Core) -> None:
        if (trainer.step + 1) % self.interval:
            return
        held = {id(p) for p in trainer.updater.parameters}
        named = [
            (name, p)
            for name, p in trainer.unwrapped_model.named_parameters()
            if id(p) in held and p.grad is not None
        ]
        self._measured = [p for _, p in named]
        self._layers = [self._layer(name) for name, _ in named]
        self._gradients = norms([p.grad for p in self._measured if p.grad is not None])
        if self.updates:
            self._before = [p.detach().clone() for p in self._measured]

    def on_after_optimizer_step(self, trainer: Core) -> None:
        if self._before:
            changes = [p.detach() - before for p, before in zip(self._measured, self._before, strict=True)]
            self._ratios = norms(changes), norms(self._before)
            self._before = []

    def on_after_step(self, trainer: Core) -> None:
        if self._gradients is None:
            return
        layers = list(dict.fromkeys(self._layers)) if self.per_layer is not False else []
        places = [layers.index(name) for name in self._layers] if layers else []
        columns = [_root_of_sum(self._gradients, [0] * len(self._layers), 1)]
        if layers:
            columns += [_root_of_sum(self._gradients, places, len(layers))]
        if self._ratios is not None:
            moved, weight = (
                _root_of_sum(part, places or [0] * len(self._layers), len(layers) or 1)
                for part in self._ratios
            )
            columns += [torch.where(weight > 0, moved / weight, 0.0)]
        total, *rest = torch.cat(columns).tolist()  # the one copy
        figures: dict[str, Any] = {"norm": total}
        if layers:
            figures["layer"] = dict(zip(layers, rest, strict=False))
        if self._ratios is not None:
            ratios = rest[len(layers) :]
            figures["update"] = dict(zip(layers, ratios, strict=True)) if layers else ratios[0]
        self._forget()
        self.last = {"gradients": figures}
        trainer.log(self.last, dry_run=not runtime.is_main_process())

    def on_close(self, trainer: Core) -> None:
        self._forget()

    def _forget(self) -> None:
        self._measured, self._layers, self._before = [], [], []
        self._gradients = self._ratios = None

    def _layer(self, name: str) -> str:
        parts = name.split(".")
        depth = len(parts) - 1 if self.per_layer is True else int(self.per_layer)
        return ".".join(parts[:depth]) or name


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each tensor in float32, (P,), on the first one's device; of sharded ones that of the whole.

    All ranks must call it with the same tensors: sharded ones take one exchange.
    """
    parts = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    found = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in parts]
    device = shards.local(found[0]).device
    sharded = [shards.is_sharded(norm) for norm in found]
    result = torch.empty(len(found), device=device)
    for kind in (True, False):
        places = [i for i, is_sharded in enumerate(sharded) if is_sharded is kind]
        if places:
            stacked: Any = torch.stack([found[i].float() for i in places])
            result[places] = (stacked.full_tensor() if kind else stacked).to(device)
    return result


def _root_of_sum(norms: Tensor, places: list[int], size: int) -> Tensor:
    index = torch.tensor(places, device=norms.device)
    return norms.new_zeros(size).index_add_(0, index, norms.square()).sqrt()

"""New tasks from others: sums, differences, TIES, DARE.

    combine(model, {"math": 1.0, "toxic": -0.5}, name="kind")         Δ = ΔW_math − 0.5·ΔW_toxic

Every task stands for what it adds to a layer's weight as a matrix, ΔW_t (…, out, in); with DoRA that is W' − W. The
new task is a plain LoRA with s = 1 on the union of the layers; where a task has no adapter its ΔW_t is 0.

    cat               [w₁c₁B₁, w₂c₂B₂ …]·[A₁; A₂; …]     exact, of rank Σ r_t; c = g·s
    svd               Σ w_t·ΔW_t
    magnitude_prune   Σ w_t·trim(ΔW_t)                   trim keeps the `density` entries of largest magnitude
    dare              Σ w_t·drop(ΔW_t)                   drop keeps an entry with probability `density`, divided by it
    ties              elect({w_t·trim(ΔW_t)})            elect: entry by entry the sign σ of the sum, then the mean of
    dare_ties         elect({w_t·drop(ΔW_t)})            the values that have this sign

All but cat are written as B·A of rank r by the truncated SVD B = U·√S, A = √S·Vᵀ, the nearest matrix of that rank;
the report says what it left out. For cat and svd it is taken of the factors (QR, then a small SVD), and no dense
matrix is formed.

Two things differ from PEFT's `add_weighted_adapter`. Its "linear", "ties", "dare_…" and "magnitude_prune" work on A
and B apart, where (ΣB)·(ΣA) holds the products of one task's B with another's A; here, as in its "…_svd" forms, they
work on ΔW (and there is no "linear"). And it elects signs before it weighs the tasks, so that a subtracted task votes
for what it is meant to remove.

Sources: Ilharco et al. 2023 for task arithmetic (arXiv 2212.04089), Yadav et al. 2023 for TIES (2306.01708), Yu et al.
2023 for DARE (2311.03099).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.config import AdapterConfig
from orbit.adapter.errors import ConfigError, GraftError, MergeError, RouteError, TaskError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import inject, remove, set_trainable, task_layers, tasks, unwrapped
from orbit.adapter.kinds.attention import AttentionGraft
from orbit.adapter.kinds.whole import ParameterSite
from orbit.adapter.matrices import SUMS, Factors, norm_of_product, svd, svd_of_product, truncated
from orbit.adapter.offload import weights_at_hand
from orbit.adapter.owners import BiasSlot, Slot, TokenSlot, check_task_name
from orbit.adapter.routes.route import state_of
from orbit.core.patterns import clean

METHODS = ("cat", "svd", "ties", "dare", "dare_ties", "magnitude_prune")
_SPARSE = ("ties", "dare", "dare_ties", "magnitude_prune")


@dataclass(frozen=True)
class LayerCombination:
    """What became of one layer.

    Attributes:
        rank: of the new task.
        error: ‖Δ − B·A‖/‖Δ‖, what the new factors miss of the matrix Δ that the method asks for.
        norm: ‖Δ‖, Frobenius.
    """

    rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class CombineReport:
    """What `combine` did.

    Attributes:
        name: the new task.
        method: how.
        weights: of the tasks that it was made from.
        layers: each layer's rank and error, by dotted name.
        error: of all layers together, √(Σ‖Δ − B·A‖²/Σ‖Δ‖²).
    """

    name: str
    method: str
    weights: dict[str, float]
    layers: dict[str, LayerCombination]
    error: float

    def __str__(self) -> str:
        made = " ".join(f"{weight:+g}·{task!r}" for task, weight in self.weights.items())
        ranks = sorted({layer.rank for layer in self.layers.values()})
        rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        plural = "" if len(self.layers) == 1 else "s"
        said = f"task {self.name!r} = {made} by {self.method}: {len(self.layers)} layer{plural} of {rank}, "
        path = max(self.layers, key=lambda one: self.layers[one].error)
        worst = self.layers[path].error
        most = f" (at most {worst:.2g}, at {path!r})" if worst else ""
        return f"{said}relative error {self.error:.2g}{most}"


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    method: str = "cat",
    *,
    r: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    trainable: bool = False,
) -> CombineReport:
    """Make a new task from others. It does not become current: the model's route stays.

    Args:
        model: a model with the tasks.
        weights: each task's weight; negative ones subtract.
        name: of the new task.
        method: "cat", "svd", "ties", "dare", "dare_ties" or "magnitude_prune"; the module's equations.
        r: the rank of the new task, for every method but cat; by default the largest that the layer has among the
            tasks. Layers whose update has a lower rank get that.
        density: in (0, 1], the share of entries to keep, for the last four methods.
        seed: of the draws of "dare" and "dare_ties"; 0 by default.
        trainable: whether the new task trains.

    Raises:
        TaskError: no such task, a name that is taken, or a task that is a module of its own. ConfigError: a value
        outside its range, or one that the method does not use. MergeError: a DoRA task with "cat" (its update is of
        full rank), values that are not finite, or a task is merged. RouteError: the model is running. The model is
        unchanged.

    >>> from orbit.adapter import inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for task in ("math", "toxic"): _ = inject(model, AdapterConfig(r=2), task)
    >>> print(combine(model, {"math": 1.0, "toxic": -0.5}, "kind"))
    task 'kind' = +1·'math' -0.5·'toxic' by cat: 1 layer of rank 4, relative error 0
    """
    model = unwrapped(model)
    _check(weights, method, r, density, seed)
    slots = _slots(model, weights, name)
    rng = torch.Generator().manual_seed(seed or 0)
    made = {}
    for path, (layer, carried) in slots.items():
        try:
            made[path] = _combined(layer, carried, method, r, density, rng)
        except MergeError as error:
            raise MergeError(f"layer {path!r}: {error}") from None
    _add(model, name, made, {path: layer for path, (layer, _) in slots.items()})
    set_trainable(model, name, trainable)
    total = math.sqrt(sum(one.norm**2 for one in made.values()))
    missed = math.sqrt(sum(one.missed**2 for one in made.values()))
    layers = {
        path: LayerCombination(one.A.shape[-2], _share(one.missed, one.norm), one.norm)
        for path, one in made.items()
    }
    return CombineReport(name, method, dict(weights), layers, _share(missed, total))


# -- checking ------------------------------------------------------------------------------------------------


def _check(
    weights: Mapping[str, float], method: str, r: int | None, density: float | None, seed: int | None
) -> None:
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"weights is a dict of task: weight, and not empty; got {weights!r}")
    for task, weight in weights.items():
        if not _is_number(weight):
            raise ConfigError(f"the weight of task {task!r} must be a finite number, got {weight!r}")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"r must be a whole number >= 1, got {r!r}")
    if r is not None and method == "cat":
        raise ConfigError(f"r={r} has no meaning for 'cat', whose rank is the sum of the ranks; use 'svd'")
    if method in _SPARSE and density is None:
        raise ConfigError(f"{method!r} needs density, the share of entries to keep, in (0, 1]")
    if density is not None:
        if method not in _SPARSE:
            raise ConfigError(
                f"density={density!r} has no meaning for {method!r}; {', '.join(_SPARSE)} use it"
            )
        if not _is_number(density) or not 0 < density <= 1:
            raise ConfigError(f"density must lie in (0, 1], got {density!r}")
    if seed is not None and not method.startswith("dare"):
        raise ConfigError(f"seed={seed!r} has no meaning for {method!r}, which draws nothing")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


_Carried = list[tuple[float, str, Slot]]  # weight, task and owners, of the tasks that a layer carries


def _slots(model: nn.Module, weights: Mapping[str, float], name: str) -> dict[str, tuple[Graft, _Carried]]:
    """The union of the tasks' layers, with what each carries."""
    check_task_name(name)
    if name in tasks(model):
        raise TaskError(f"there is a task {name!r} already; remove it first or choose another name")
    layers: dict[str, Graft] = {}
    for task in weights:
        layers.update(task_layers(model, task))
    state = state_of(model)
    if state.merged is not None:
        raise MergeError(f"task {state.merged!r} is merged into the weights; unmerge it first")
    if state.busy:
        raise RouteError(f"task {name!r} cannot be added while a call or a `with route` is running")
    found: dict[str, tuple[Graft, _Carried]] = {}
    for path, layer in layers.items():
        carried: _Carried = []
        for task, weight in weights.items():
            slot = layer.slots().get(task)
            if slot is None:
                continue
            if not isinstance(slot, Slot):
                what = {BiasSlot: "has a bias", TokenSlot: "has rows"}.get(type(slot), "is a module")
                raise TaskError(
                    f"task {task!r} {what} of its own at layer {path!r}, no low-rank update that could be added"
                )
            if slot.bias is not None:
                raise TaskError(
                    f"task {task!r} has a bias of its own at layer {path!r}, which no factors can hold"
                )
            carried.append((float(weight), task, slot))
        found[path] = layer, carried
    return found


# -- the methods ---------------------------------------------------------------------------------------------


def _combined(
    layer: Graft, carried: _Carried, method: str, r: int | None, density: float | None, rng: torch.Generator
) -> Factors:
    with torch.no_grad():
        factors = []
        for weight, task, slot in carried:
            A, B = layer.update(slot)
            if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
                raise MergeError(f"task {task!r} holds values that are not finite")
            dtype = dora.wide(A.dtype)
            factors.append((A.to(dtype), weight * slot.coefficient.to(dtype) * B.to(dtype)))
        magnitudes = [task for _, task, slot in carried if slot.magnitude is not None]
        if method == "cat" and magnitudes:
            raise MergeError(
                f"task {magnitudes[0]!r} is DoRA, whose update m∘(W + ΔW)/‖W + ΔW‖ − W has full rank and is no sum of "
                "factors; use method='svd', which reports what it leaves out"
            )
        if method in ("cat", "svd") and not magnitudes:
            A, B = torch.cat([A for A, _ in factors], -2), torch.cat([B for _, B in factors], -1)
            rank = A.shape[-2] if method == "cat" else r or max(A.shape[-2] for A, _ in factors)
            if method == "cat" and rank <= min(A.shape[-1], B.shape[-2]):
                return Factors(A, B, 0.0, norm_of_product(A, B))
            return truncated(*svd_of_product(A, B), rank)
        deltas = [weight * _dense(layer, slot) for weight, _, slot in carried]
        assert method == "svd" or density is not None
        Delta = SUMS[method](deltas, 1.0 if density is None else density, rng)
        return truncated(*svd(Delta), r or max(A.shape[-2] for A, _ in factors))


def _dense(layer: Graft, slot: Slot) -> Tensor:
    """What a task adds to the weight, as a matrix (…, out, in)."""
    delta = layer.delta(slot)
    if slot.magnitude is None:
        return delta
    with weights_at_hand(layer):
        W = layer.matrix()
    V = W + delta
    m = slot.magnitude.weight.to(V.dtype).reshape(V.shape[:-1])
    return dora.ratio(m, V.norm(dim=-1))[..., None] * V - W


def _share(missed: float, norm: float) -> float:
    return missed / norm if norm else 0.0


# -- the new task --------------------------------------------------------------------------------------------


def _add(model: nn.Module, name: str, made: Mapping[str, Factors], layers: Mapping[str, Graft]) -> None:
    """Inject the task with these factors and s = 1, and put the route back."""
    within = _attentions(model)
    names = {path: within.get(id(layers[path]), path) for path in made}  # as a config knows them
    ranks: dict[str, int] = {}
    for path, one in made.items():
        ranks[names[path]] = max(ranks.get(names[path], 0), one.A.shape[-2])
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(clean(path))}": rank for path, rank in ranks.items() if rank != usual}
    alone = {path for path in made if names[path] == path and isinstance(layers[path], ParameterSite)}
    config = AdapterConfig(
        r=usual,
        alpha=float(usual),
        targets=tuple(f"re:{re.escape(path)}" for path in ranks if path not in alone),
        parameters=tuple(f"re:{re.escape(path)}" for path in ranks if path in alone),
        rank_pattern=pattern,
        alpha_pattern={key: float(rank) for key, rank in pattern.items()},
    )
    state = state_of(model)
    before = state.default
    report = inject(model, config, name, freeze_base=False)
    state.set_default(before)
    if set(report.layers) != set(made):
        remove(model, name)
        raise GraftError(
            f"the layers of task {name!r} would be {sorted(report.layers)} and not {sorted(made)}: "
            "some lie within others"
        )
    for path, one in made.items():
        slot = layers[path].low_rank_slot(name)
        short = slot.up.r - one.A.shape[-2]  # where the projections of an attention differ in rank
        assert short >= 0
        A, B = F.pad(one.A, (0, 0, 0, short)), F.pad(one.B, (0, short))
        layers[path].set_factors(slot, A, B)


def _attentions(model: nn.Module) -> dict[int, str]:
    """Of each layer that an attention is adapted through, by id: the attention's name, which is the target."""
    return {
        id(site): path
        for path, attention in model.named_modules()
        if isinstance(attention, AttentionGraft)
        for site in attention.sites().values()
    }

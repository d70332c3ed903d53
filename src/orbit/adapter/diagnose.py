"""Is an adapter learning, and does it use its rank?

    ΔW = c·B·A = U·diag(σ)·Vᵀ        c = g·s; σ₁ ≥ σ₂ ≥ …: the spectrum of the update, not of A or B

    B = Q_b·R_b, Aᵀ = Q_a·R_a        σ is the spectrum of c·R_b·R_aᵀ (r, r): ΔW itself is never formed
    effective rank                   exp(−Σ pᵢ·ln pᵢ), p = σ/Σσ          from 1 to r
    stable rank                      Σσ²/σ₁²                              from 1 to r
    ratio                            ‖ΔW‖/‖W‖, Frobenius; ‖W‖ is kept while W stays as it is
    rank use                         (effective rank − 1)/(r − 1)         0: one direction, 1: all alike

A DoRA task is judged by this ΔW, the part that turns the weight's rows; its magnitude is not looked at. A task with a
start (`init.py`) is judged by s·(B·A − B₀·A₀), of rank 2r, and its rank use may exceed 1.

    not finite    A or B holds NaN or infinity
    no gradient   other tensors of the task have gradients, and none of this layer's has one that is not 0
    dead          σ₁ = 0: the layer adds nothing (as every fresh adapter does)
    collapse      rank use < 0.1: a smaller r would do, or the learning rate is too high
    dominant      ratio > 1: the update drowns the weight

Sources: effective rank: Roy and Vetterli 2007 (EUSIPCO, "The effective rank"); stable rank: Rudelson and Vershynin 2007
(arXiv math/0503442). The thresholds are rules of thumb of this library.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.errors import ConfigError, MergeError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import one_task, task_layers, unwrapped
from orbit.adapter.offload import weights_at_hand
from orbit.adapter.owners import Slot
from orbit.adapter.routes.route import state_of
from orbit.core.extras import need

_HEADER = (
    f"{'layer':<40} {'r':>4} {'eff.':>6} {'stable':>6} {'σ₁':>9} {'‖ΔW‖/‖W‖':>9} "
    f"{'‖∇A‖':>9} {'‖∇B‖':>9}  findings"
)


@dataclass(frozen=True)
class Finding:
    """A rule that a layer breaks: `value` lies beyond `threshold`."""

    layer: str
    rule: str
    value: float
    threshold: float

    def __str__(self) -> str:
        return f"{self.layer}: {self.rule} ({self.value:.3g}; threshold {self.threshold:g})"


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer; of a layer with many weights of one shape (experts), one of them, "name[3]".

    Attributes:
        r: the rank of its factors.
        spectrum: the singular values of ΔW, falling.
        effective_rank, stable_rank: see the module; 0 where ΔW = 0.
        norm: ‖ΔW‖.
        ratio: ‖ΔW‖/‖W‖.
        grad_A, grad_B: the norms of the gradients, None without one. Of a layer with many weights: of all together.
        findings: the rules that it breaks.
    """

    layer: str
    r: int
    spectrum: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    norm: float
    ratio: float
    grad_A: float | None
    grad_B: float | None
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        first = self.spectrum[0] if self.spectrum else 0.0
        rules = ", ".join(finding.rule for finding in self.findings) or "-"
        return (
            f"{self.layer[-40:]:<40} {self.r:>4} {self.effective_rank:>6.2f} {self.stable_rank:>6.2f} {first:>9.3g} "
            f"{self.ratio:>9.3g} {_shown(self.grad_A)} {_shown(self.grad_B)}  {rules}"
        )


@dataclass(frozen=True)
class Diagnosis:
    """A task at one moment. `str()` is a table, iterating gives the layers."""

    task: str
    layers: tuple[LayerDiagnosis, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong, layer by layer; empty if nothing is."""
        return tuple(finding for layer in self.layers for finding in layer.findings)

    @property
    def healthy(self) -> bool:
        """Is there no finding?"""
        return not self.findings

    def __iter__(self) -> Iterator[LayerDiagnosis]:
        return iter(self.layers)

    def __str__(self) -> str:
        many = "1 finding" if len(self.findings) == 1 else f"{len(self.findings)} findings"
        layers = "1 layer" if len(self.layers) == 1 else f"{len(self.layers)} layers"
        return "\n".join([f"task {self.task!r}: {layers}, {many}", _HEADER, *map(str, self.layers)])


@dataclass
class LoRADiagnoser:
    """Look at a task, as often as wanted, also in the middle of training.

    There are gradients between backward and zero_grad only: in a trainer's loop, inside a plugin's
    `on_before_optimizer_step`.

    Args:
        model: a model with the task.
        name: the task; None means the only or the current one.
        collapse: the rank use below which a layer counts as collapsed.
        dominant: the ratio ‖ΔW‖/‖W‖ above which an update counts as dominant.

    Raises:
        TaskError: no such task. ConfigError: a threshold below 0.

    >>> from orbit.adapter import AdapterConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = inject(model, AdapterConfig(r=2))
    >>> [str(finding) for finding in LoRADiagnoser(model).report().findings]
    ['0: dead (0; threshold 0)']
    """

    model: nn.Module
    name: str | None = None
    collapse: float = 0.1
    dominant: float = 1.0

    _norms: weakref.WeakKeyDictionary[Graft, tuple[Any, Tensor]] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for label in ("collapse", "dominant"):
            if not getattr(self, label) >= 0:
                raise ConfigError(f"{label} must not be negative, got {getattr(self, label)!r}")
        self.name = one_task(unwrapped(self.model), self.name)
        task_layers(unwrapped(self.model), self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_norms": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _norms=weakref.WeakKeyDictionary())

    def report(self) -> Diagnosis:
        """The task as it is now. Layers where it is a module of its own are left out.

        Raises:
            TaskError: the task is gone. MergeError: a task is merged, so that W is not at hand.
        """
        assert self.name is not None
        model = unwrapped(self.model)
        layers = task_layers(model, self.name)
        if state_of(model).merged is not None:
            raise MergeError(f"task {state_of(model).merged!r} is merged into the weights; unmerge first")
        slots = {path: layer.slots()[self.name] for path, layer in layers.items()}
        trains = any(_grads(slot) for slot in slots.values() if isinstance(slot, Slot))
        found: list[LayerDiagnosis] = []
        with torch.no_grad():
            for path, slot in slots.items():
                if isinstance(slot, Slot):
                    found += self._look(path, layers[path], slot, trains)
        return Diagnosis(self.name, tuple(found))

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture of the task as it is now: spectra, ranks and ratios. The suffix says the format.

        Raises:
            MissingExtraError: matplotlib is not installed. Else as `report`.
        """
        need("plot", "matplotlib")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        seen = self.report()
        figure = Figure(figsize=(14, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        spectra, ranks, ratios = figure.subplots(1, 3)
        figure.suptitle(f"task {seen.task!r}: {len(seen.layers)} layers, {len(seen.findings)} findings")
        for layer in seen:
            if layer.norm > 0:
                spectra.semilogy(range(1, len(layer.spectrum) + 1), layer.spectrum, alpha=0.5)
        spectra.set(title="singular values of ΔW", xlabel="index", ylabel="σ")
        index = range(len(seen.layers))
        ranks.plot(index, [layer.effective_rank for layer in seen], "o", label="effective rank")
        ranks.plot(index, [layer.stable_rank for layer in seen], "x", label="stable rank")
        ranks.plot(index, [layer.r for layer in seen], "_", label="rank")
        ranks.set(title="rank in use", xlabel="layer")
        ranks.legend()
        bad = {finding.layer for finding in seen.findings}
        colours = ["tab:red" if layer.layer in bad else "tab:blue" for layer in seen]
        ratios.bar(index, [layer.ratio for layer in seen], color=colours)
        ratios.set(title="‖ΔW‖/‖W‖ (red: with findings)", xlabel="layer")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        return path

    def _look(self, path: str, layer: Graft, slot: Slot, trains: bool) -> list[LayerDiagnosis]:
        A, B = layer.update(slot)
        dtype = dora.wide(A.dtype)
        A, B, c = A.to(dtype), B.to(dtype), slot.coefficient.to(dtype)
        finite = bool(torch.isfinite(A).all() and torch.isfinite(B).all() and torch.isfinite(c))
        r = min(A.shape[-2:] + B.shape[-2:])
        if finite:
            Rb, Ra = torch.linalg.qr(B).R, torch.linalg.qr(A.mT).R
            spectra = torch.linalg.svdvals(c * (Rb @ Ra.mT))[..., :r]
            if slot.start is not None:  # B·A − B₀·A₀ cancels to the rounding of its two products
                size = c.abs() * torch.linalg.matrix_norm(Rb) * torch.linalg.matrix_norm(Ra)
                spectra = spectra.where(spectra > torch.finfo(dtype).eps * size[..., None], 0)
        else:
            spectra = torch.full((*A.shape[:-2], r), torch.nan)
        grad_A, grad_B = _norm(slot.down.weight.grad), _norm(slot.up.weight.grad)
        norms = self._weight_norm(layer).expand(spectra.shape[:-1])
        found = []
        rows = zip(spectra.reshape(-1, r).tolist(), norms.flatten().tolist(), strict=True)
        for index, (spectrum, weight) in enumerate(rows):
            label = f"{path}[{index}]" if spectra.dim() > 1 else path
            found.append(
                self._judge(
                    label, slot.up.r, spectrum, weight, grad_A, grad_B, trains and bool(_params(slot))
                )
            )
        return found

    def _judge(
        self,
        layer: str,
        r: int,
        spectrum: list[float],
        weight: float,
        grad_A: float | None,
        grad_B: float | None,
        trains: bool,
    ) -> LayerDiagnosis:
        sigma = torch.tensor(spectrum, dtype=torch.float64)
        norm, total = float(sigma.norm()), float(sigma.sum())
        ratio = norm / weight if weight else float("inf") if norm else 0.0
        effective = stable = 0.0
        findings = []
        if not torch.isfinite(sigma).all():
            effective = stable = float("nan")
            findings.append(Finding(layer, "not finite", float("nan"), 0.0))
        if trains and not grad_A and not grad_B:
            findings.append(Finding(layer, "no gradient", 0.0, 0.0))
        if norm == 0:
            findings.append(Finding(layer, "dead", 0.0, 0.0))
        elif total > 0:
            p = sigma[sigma > 0] / total
            effective = float(torch.exp(-(p * p.log()).sum()))
            stable = float((sigma / sigma[0]).square().sum())
            use = (effective - 1) / (r - 1) if r > 1 else 1.0
            if use < self.collapse:
                findings.append(Finding(layer, "collapse", use, self.collapse))
            if ratio > self.dominant:
                findings.append(Finding(layer, "dominant", ratio, self.dominant))
        return LayerDiagnosis(
            layer, r, tuple(spectrum), effective, stable, norm, ratio, grad_A, grad_B, tuple(findings)
        )

    def _weight_norm(self, layer: Graft) -> Tensor:
        """‖W‖ (…), kept while W is the same tensor and unchanged."""
        home, key = layer.home()
        parameter = home._parameters.get(key)  # None: parametrized, and computed from other parameters
        own = list(home.parameters()) if parameter is None else [parameter]
        mark = tuple((id(p), 0 if p.is_inference() else p._version, p.dtype) for p in own)
        seen, norm = self._norms.get(layer, (None, None))
        if norm is None or seen != mark:
            with weights_at_hand(layer):
                norm = torch.linalg.matrix_norm(layer.matrix())
            self._norms[layer] = mark, norm
        return norm


def _params(slot: Slot) -> list[nn.Parameter]:
    return [p for p in (slot.down.weight, slot.up.weight) if p.requires_grad]


def _grads(slot: Slot) -> bool:
    return any(p.grad is not None for p in _params(slot))


def _norm(grad: Tensor | None) -> float | None:
    return None if grad is None else float(grad.float().norm())


def _shown(norm: float | None) -> str:
    return f"{'-':>9}" if norm is None else f"{norm:>9.3g}"

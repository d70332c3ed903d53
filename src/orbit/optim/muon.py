"""Muon for the hidden matrices of a model and AdamW for the rest, in one optimizer.

    B ← μB + (1-μ)G         U = (1-μ)G + μB  (Nesterov; else U = B)        O = NS(U) ≈ (UUᵀ)^-½ U
    W ← W - ηλW - η·a·O

    G, B, U, O, W (m, n)    gradient, momentum, update, orthogonalised update, weight of one matrix
    η, λ, μ                 learning rate, weight decay, momentum
    a                       adjusts η to the shape: √max(1, m/n) ("original") or 0.2·√max(m, n) ("match_rms_adamw")

    NS   X ← U/‖U‖, then five times  A = XXᵀ,  X ← c₁X + (c₂A + c₃A²)X  in bfloat16: singular values go to about 1
         without an SVD; tall matrices are transposed first

Matrices are stepped by `torch.optim.Muon` and the rest by `torch.optim.AdamW`, which look at the groups and the state
of this optimizer; so there is one `param_groups` for a scheduler, one `state_dict()` and one `step()`. Stacks of
matrices (…, m, n), which torch's Muon does not take, are stepped here, all matrices of a stack at once; and so is what
lies in pieces on several ranks (FSDP2): the momentum is gathered once, where torch's would exchange and round every
product of NS.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; "match_rms_adamw": Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orbit.core.ranks import shards
from orbit.optim.hidden import Split, split


class Muon(Optimizer):
    """Muon and AdamW behind the face of one optimizer.

    `Muon.for_model(model)` divides a model's parameters by what they are. From parameters alone, as in
    `Muon(params, lr=0.02)`, only the shape can be seen: those of two dimensions go to Muon and all others to AdamW, so
    give embeddings and heads in a group of their own with `use_muon=False`, or use `for_model`.

    Args:
        params: parameters, named parameters or groups. A group may say `use_muon=True` or False for all it holds, and
            with `flatten=True` that its parameters of more dimensions are matrices (first, all others), as for
            convolutions; without it the last two dimensions are a matrix and the others count them.
        lr: Muon's learning rate, of groups that do not give their own.
        weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as `torch.optim.Muon`.
            With adjust_lr_fn="match_rms_adamw" an update is as large as AdamW's: give lr and adamw_lr the same value.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the part that AdamW trains.
        foreach: AdamW's; None lets torch choose.

    Attributes:
        report: the `Split` that `for_model` chose; print it. None otherwise.

    Raises:
        ValueError: a number outside its range; a vector in a group with use_muon=True.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 10, bias=False))
    >>> optimizer = Muon.for_model(model, lr=0.02, adamw_lr=3e-4)
    >>> print(optimizer.report)
    1 parameters with Muon, 2 with AdamW
      Muon   1.weight: matrix
      AdamW  0.weight: embedding
      AdamW  2.weight: head
    >>> [(group["use_muon"], group["lr"]) for group in optimizer.param_groups]
    [(True, 0.02), (False, 0.0003)]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        nothing: Any = [{"params": []}]
        self.report: Split | None = None
        self._muon: Optimizer = torch.optim.Muon(
            nothing,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )
        self._adamw: Optimizer = torch.optim.AdamW(
            nothing,
            lr=adamw_lr,
            betas=adamw_betas,
            eps=adamw_eps,
            weight_decay=adamw_weight_decay,
            foreach=foreach,
        )
        super().__init__(params, {"lr": lr})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float = 0.02,
        adamw_lr: float = 3e-4,
        *,
        conv: bool = False,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> Muon:
        """Muon for the hidden matrices of `model`, AdamW for what else trains; `report` says which is which.

        Args:
            conv: convolution kernels are Muon's too, as matrices (out, in·∏k).
            exclude: names or globs of parameters or modules that AdamW trains all the same.
            **options: further arguments of the constructor.

        Raises:
            ValueError: the model has no matrix for Muon; a name in `exclude` matches nothing.
        """
        chosen = split(model, conv=conv, exclude=exclude)
        if not chosen.muon:
            raise ValueError(
                f"Muon has nothing to train in this {type(model).__name__}: none of its {len(chosen.adamw)} trainable "
                "parameters is a hidden matrix (conv=True takes convolutions); use torch.optim.AdamW.\n"
                f"{chosen}"
            )
        named = dict(model.named_parameters())
        groups = [
            {"params": [named[n] for n, r in chosen.muon.items() if r != "kernel"], "use_muon": True},
            {"params": [named[n] for n in chosen.adamw], "use_muon": False},
        ]
        if kernels := [named[n] for n, r in chosen.muon.items() if r == "kernel"]:
            groups.insert(1, {"params": kernels, "use_muon": True, "flatten": True})
        optimizer = cls(groups, lr, adamw_lr=adamw_lr, **options)
        optimizer.report = chosen
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; without `use_muon` they are divided by shape, into up to two groups. ValueError as above."""
        given = param_group["params"]
        if isinstance(given, set):
            raise TypeError("a set of parameters has no order that a checkpoint could rely on: give a list")
        entries: list[Any] = [given] if isinstance(given, Tensor) else list(given)
        if "use_muon" not in param_group:
            self._add_by_shape(param_group, entries)
            return
        if param_group["use_muon"]:
            for p in map(_tensor, entries):
                _require_matrix(p)
        part = self._muon if param_group["use_muon"] else self._adamw
        super().add_param_group({**part.defaults, "flatten": False, **param_group, "params": entries})

    def _add_by_shape(self, group: dict[str, Any], entries: list[Any]) -> None:
        matrices = [entry for entry in entries if _tensor(entry).ndim == 2]
        others = [entry for entry in entries if _tensor(entry).ndim != 2]
        if others and "lr" in group:
            raise ValueError(
                f"lr={group['lr']} of a group with {len(others)} parameters that are no matrices: Muon and AdamW need "
                "rates of their own; make two groups, with use_muon=True and use_muon=False"
            )
        for use_muon, part in ((True, matrices), (False, others)):
            if part:
                self.add_param_group({**group, "params": part, "use_muon": use_muon})

    def group_for(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The group that `parameter` joins if it is to train like those of `group`: AdamW's if Muon cannot read it."""
        if not group["use_muon"] or parameter.ndim >= 2:
            return group
        others = [g for g in self.param_groups if not g["use_muon"]]
        if not others:
            _require_matrix(parameter)
        return others[0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Raises:
            ValueError: Muon was given a vector. RuntimeError: a sparse gradient of a matrix.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, others = [], []
        for group in self.param_groups:
            if not group["use_muon"]:
                others.append(group)
                continue
            plain = [p for p in group["params"] if p.ndim == 2 and not shards.is_sharded(p)]
            matrices.append({**group, "params": plain})
            taken = set(map(id, plain))
            for p in group["params"]:
                if id(p) not in taken and p.grad is not None:
                    self._step_stack(p, group)
        for part, groups in ((self._muon, matrices), (self._adamw, others)):
            part.param_groups, part.state = groups, self.state
            part.step()
        return loss

    def _step_stack(self, p: Tensor, group: dict[str, Any]) -> None:
        """The equations above for all matrices of (…, m, n), or for the one of (m, …) if the group flattens."""
        _require_matrix(p)
        assert p.grad is not None
        if p.grad.is_sparse:
            raise RuntimeError(
                f"Muon cannot orthogonalise the sparse gradient of a parameter {tuple(p.shape)}"
            )
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum, lr = group["momentum"], group["lr"]
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        update = state["momentum_buffer"]
        if group["nesterov"]:
            update = p.grad.lerp(update, momentum)
        rows, columns = (p.shape[0], prod(p.shape[1:])) if group["flatten"] else p.shape[-2:]
        matrices = shards.gathered(update).reshape(-1, rows, columns)
        update = orthogonalised(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
        p.mul_(1 - lr * group["weight_decay"])
        update = shards.cut_like(p, update.view(p.shape))
        p.add_(update, alpha=-lr * _ratio(group["adjust_lr_fn"], rows, columns))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("flatten", False)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch keeps only groups and state


def orthogonalised(
    matrices: Tensor,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """NS of the module docstring for each of `matrices` (k, m, n); bfloat16, in the same shape."""
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def _ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * sqrt(max(rows, columns))
    return sqrt(max(1.0, rows / columns))


def _tensor(entry: Any) -> Tensor:
    """A parameter, or one with its name."""
    return entry[1] if isinstance(entry, tuple) else entry


def _require_matrix(p: Tensor) -> None:
    if p.ndim < 2:
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} in a group with use_muon=True: Muon trains matrices; put it into a "
            "group with use_muon=False, which AdamW trains, or use Muon.for_model(model)"
        )

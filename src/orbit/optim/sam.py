"""Sharpness-aware minimisation: step with the gradient of the worst point nearby, around any optimizer.

    e = ρ·g/‖g‖                          g = ∇L(w), over all parameters together
    w ← base(w, ∇L(w + e))

    adaptive (ASAM):  e = ρ·w²g/‖|w|g‖    so that rescaling a layer does not change what "nearby" means

The gradient is taken twice a step. In an Engine or BaseTrainer that is done for you: the window's micro-batches are run
again at w + e, with the same random numbers, and only the second gradient is clipped and stepped with. In a loop of
your own:

    loss.backward(); optimizer.first_step(zero_grad=True)          # now at w + e
    loss_of(batch).backward(); optimizer.second_step(zero_grad=True)

or `optimizer.step(closure)`. What the loss depends on besides the batch must be asked for inside the forward, or inside
the function given to `update`: a `with` block around the call is not entered again.

Foret et al. 2021, arXiv:2010.01412; Kwon et al. 2021, arXiv:2102.11600 (adaptive).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from orbit.core.ranks import shards


class SAM(Optimizer):
    """SAM around a base optimizer, with which it shares groups and state.

    Args:
        params: parameters or groups; a group may have its own `rho` and `adaptive`.
        base_optimizer: a class, called with the groups and `**options`; or an optimizer that was made from `params`.
        rho: ρ, >= 0: how far away the worst point is looked for.
        adaptive: measure the distance in units of each weight's size; ρ is then about ten times as large.
        **options: of the base class: lr, weight_decay, ...

    Attributes:
        base: the base optimizer.
        passes: 2, by which a training loop knows that the gradient is wanted again after `perturb()`.

    Raises:
        TypeError: a base that is neither class nor optimizer.
        ValueError: a negative or infinite ρ; a base that needs a closure or keeps its parts apart, or holds other
            parameters.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)
    >>> w.square().sum().backward(); optimizer.first_step(zero_grad=True); w.detach()
    tensor([3.3000, 4.4000])
    >>> w.square().sum().backward(); optimizer.second_step(zero_grad=True); w.detach()
    tensor([2.3400, 3.1200])
    """

    passes = 2

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        _require_rho(rho)
        if not (callable(base_optimizer) or isinstance(base_optimizer, Optimizer)):
            raise TypeError(
                f"base_optimizer={base_optimizer!r} is no optimizer: SAM(params, torch.optim.SGD, lr=0.1), or one made "
                "from params"
            )
        if isinstance(base_optimizer, Optimizer):
            _require_base(base_optimizer)
            if options:
                raise ValueError(
                    f"{', '.join(options)}= beside a base optimizer that is made already: give them to it"
                )
            _require_the_same(params, base_optimizer)
            params = base_optimizer.param_groups
        self._kept: list[tuple[Tensor, Tensor]] = []  # while perturbed: each parameter and what it was
        self._ready = False  # the gradients are those of w + e
        super().__init__(params, {"rho": rho, "adaptive": adaptive})
        for group in self.param_groups:
            _require_rho(group["rho"])
        if isinstance(base_optimizer, Optimizer):
            self.base = base_optimizer
        else:
            self.base = base_optimizer(self.param_groups, **options)
        _require_base(self.base)
        self.defaults.update(self.base.defaults)
        self._follow()

    def _follow(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state
        for group in self.param_groups:
            for name in ("rho", "adaptive"):
                group.setdefault(name, self.defaults[name])

    # -- the two passes --------------------------------------------------------------------------------------

    @property
    def perturbed(self) -> bool:
        """The parameters are at w + e."""
        return bool(self._kept)

    @torch.no_grad()
    def perturb(self) -> None:
        """Go from w to w + e by the gradients at hand, which may be scaled: e does not depend on their size.

        Raises:
            RuntimeError: the parameters are perturbed already. ValueError: a sparse gradient.
        """
        if self._kept:
            raise RuntimeError("the parameters are at w + e already: take second_step() or restore() first")
        held = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p, _ in held):
            raise ValueError("SAM needs dense gradients: make the embedding with sparse=False")
        # Elementwise, so that on a rank's piece of a parameter it gives the piece of the whole's direction.
        directions = [p.grad * p.abs() if group["adaptive"] else p.grad for p, group in held]
        norm = shards.total_norm(directions)
        norm = norm.to(torch.promote_types(norm.dtype, torch.float32)) + 1e-12
        weights = [shards.local(p) for p, _ in held]
        self._kept = [(weight, weight.clone()) for weight in weights]
        kinds = [(g["rho"], g["adaptive"], w.device) for (_, g), w in zip(held, weights, strict=True)]
        for kind in dict.fromkeys(kinds):
            rho, adaptive, device = kind
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            theirs = [weights[i] for i in chosen]
            e = torch._foreach_mul([shards.local(directions[i]) for i in chosen], rho / norm.to(device))
            if adaptive:
                torch._foreach_mul_(e, torch._foreach_abs(theirs))
            torch._foreach_add_(theirs, e)
        self._ready = True

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to w, to the last bit; nothing happens where the parameters are not perturbed."""
        if self._kept:
            weights, values = zip(*self._kept, strict=True)
            torch._foreach_copy_(weights, values)
            self._kept = []

    def first_step(self, zero_grad: bool = False) -> None:
        """`perturb()`, then forget the gradients if asked to."""
        self.perturb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to w and step with the gradients of w + e."""
        self.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both passes with a closure that computes the loss and its gradients, called twice; returns the loss at w.

        Without one the gradients must be those of w + e, after `perturb()` or `first_step()`.

        Raises:
            RuntimeError: they are not. And whatever the closure raises; the parameters are at w then.
        """
        loss = None
        if closure is not None:
            try:
                with torch.enable_grad():
                    loss = closure()
                    self.first_step(zero_grad=True)
                    closure()
            finally:
                self.restore()
        elif not self._ready and any(p.grad.any() for p in self._parameters() if p.grad is not None):
            raise RuntimeError(
                "SAM needs the gradient twice: call first_step(), compute it again and call second_step(); or "
                "step(closure); or train with Engine.auto_update(), which does both"
            )  # where all gradients are 0, e is 0 and the second would be the first
        self.restore()
        self._ready = False
        self.base.step()
        return loss

    # -- one optimizer with the base -------------------------------------------------------------------------

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the base optimizer; the group may have its own `rho` and `adaptive`."""
        if not hasattr(self, "base"):  # torch's constructor collects the groups
            super().add_param_group(param_group)
            return
        _require_rho(param_group.get("rho", 0.0))
        self.base.add_param_group(param_group)
        self._follow()

    def group_for(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """See `Muon.group_for`; the base decides."""
        decide = getattr(self.base, "group_for", None)
        return group if decide is None else decide(parameter, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict()` of SAM, or of the base optimizer alone. ValueError as of the base."""
        self.base.load_state_dict(state_dict)
        self._follow()

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # torch keeps only groups and state


def _require_rho(rho: float) -> None:
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho={rho!r}: the distance to look within must be >= 0 and finite; 0.05 is usual")


def _require_base(base: Optimizer) -> None:
    name = type(base).__name__
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{name}.step() cannot do without closure=: SAM steps it with gradients alone")
    if getattr(base, "keeps_apart", False) or getattr(base, "passes", 1) > 1:
        raise ValueError(
            f"SAM cannot stand around {name}, which "
            f"{'perturbs by itself' if hasattr(base, 'perturb') else 'keeps its parts apart: one e would mix them'}; "
            "give SAM to each part, or a plain optimizer"
        )


def _require_the_same(params: Iterable[Any], base: Optimizer) -> None:
    entries = [params] if isinstance(params, Tensor) else list(params)
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in entries]
    tensors = [[group] if isinstance(group, Tensor) else group for group in groups]
    given = {id(p[1] if isinstance(p, tuple) else p) for group in tensors for p in group}
    held = {id(p) for group in base.param_groups for p in group["params"]}
    if given != held:
        raise ValueError(
            f"{type(base).__name__} holds {len(held)} parameters, and {len(given - held)} of the {len(given)} given to "
            "SAM are not among them: make it from the same parameters, or give its class"
        )

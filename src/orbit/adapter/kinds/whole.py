"""Modules that are adapted as a whole: run with other weights, or replaced by a module of the task.

Some modules read their weights in the middle of their forward, so that nothing can be added to their output:
attention, experts. Their own forward is run with other tensors in the place of parameters:

    LoRA  W' = W + ΔW,  ΔW = g·s·B·A            DoRA  W' = m∘V/‖V‖,  V = W + ΔW, row by row, the norm detached
    several tasks together   W + Σ_t w_t·(W'_t − W)        computed in at least float32 and rounded once

    W (out, in)  or, of n experts, (n, out, in); (n, in, out) where the module says `is_transposed`
    A (r, in), B (out, r)  or, of n experts, (r·n, in), expert by expert, and (out, r·n), rank by rank, as PEFT

The module is not touched, so that threads may share it: the forward runs on a shell, an object of the module's
own class whose `__dict__` is a copy with other `_parameters`. What the forward sets on itself is handed back.

Each such parameter has a site, a small child module that holds the owners of its tasks and is in everything
but running a layer of its own, under the parameter's name:

    experts.lora_parameters.gate_up_proj.lora_A.<task>.weight        the site of experts.gate_up_proj

Where the module has a child layer whose weight it reads without calling it (`attention.py`), that is a site too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_leaves

from orbit.adapter import dora
from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import ConfigError, GraftError, MergeError
from orbit.adapter.graft import Graft
from orbit.adapter.init import initialise
from orbit.adapter.kinds.registry import own_class, register_whole_kind
from orbit.adapter.lora import fresh_factors
from orbit.adapter.offload import execution_device, refuse_meta, weights_at_hand
from orbit.adapter.owners import AnySlot, Bias, BiasSlot, Down, Gate, Magnitude, Slot, Tasks, Up, Whole
from orbit.adapter.routes.mixing import mixed, weighted
from orbit.adapter.routes.plan import Mix

SITES = "lora_parameters"


class WholeGraft(Graft):
    """The mixin for modules of any class.

    Their own forward always runs on a shell: it may go through its children, among which are the tasks' containers.
    """

    _orbit_forwards: ClassVar[type[nn.Module]]  # the class whose forward `base` means

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        after = cls.__mro__[cls.__mro__.index(Graft) + 1 :]
        cls._orbit_forwards = next(base for base in after if "forward" in vars(base))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._by_plan(self.current_plan(), *args, **kwargs)

    def base(self, *args: Any, **kwargs: Any) -> Any:
        return self.run_with({}, args, kwargs)

    def one(self, slot: Whole, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        sites, tensors = self.sites(), {}
        for name, one in slot.slots.items():
            tensors.update(_changed(name, sites[name], one))
        return self.run_with(tensors, args, kwargs)

    def mixed(self, mix: Mix, *args: Any, **kwargs: Any) -> Any:
        if mix.rows is None and mix.weights.dim() == 1 and all(type(slot) is Whole for slot in mix.slots):
            return self.run_with(self._summed(mix), args, kwargs)
        if mix.rows is None or torch.compiler.is_compiling() or not self._has_layers_below():
            return mixed(self, mix, args, kwargs)  # which takes no rows apart in a compiled graph
        # Adapted layers below follow the route of all rows, so that these may not be taken apart.
        first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        each = (self.adapted(slot, *args, **kwargs) for slot in mix.slots)
        return weighted(self, self.base(*args, **kwargs), each, self.fitted(mix, first))

    def _has_layers_below(self) -> bool:
        own = {self, *self.sites().values()}
        return any(isinstance(module, Graft) and module not in own for module in self.modules())

    def _summed(self, mix: Mix) -> dict[str, Tensor]:
        """The weights of several tasks together."""
        total: dict[str, Tensor] = {}
        sites = self.sites()
        for index, slot in enumerate(mix.slots):
            assert isinstance(slot, Whole)
            for site, one in slot.slots.items():
                for name, changed in _changed(site, sites[site], one, rounded=False).items():
                    own = self.get_parameter(name)
                    wide = own.to(changed.dtype)
                    total[name] = total.get(name, wide) + mix.weights[index].to(wide.dtype) * (changed - wide)
        return {name: changed.to(self.get_parameter(name).dtype) for name, changed in total.items()}

    def run_with(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own forward with these tensors in the place of its parameters, by dotted name."""
        if torch.compiler.is_compiling():  # nothing is changed but in the trace
            with _reparametrize_module(self, dict(tensors)):
                return Graft.base(self, *args, **kwargs)
        shell = _shell(self, tensors)
        before = dict(shell.__dict__)
        output = self._orbit_forwards.forward(shell, *args, **kwargs)
        for key, value in shell.__dict__.items():
            if before.get(key, _NOTHING) is not value:
                self.__dict__[key] = value
        return output

    # -- tasks -----------------------------------------------------------------------------------------------

    def sites(self) -> dict[str, Graft]:
        # By the sites' own names: a compiled graph cannot unescape those of the container.
        return {site.parameter: site for site in self._bank(SITES)._modules.values()}  # type: ignore[union-attr, misc]

    def slots(self) -> dict[str, AnySlot]:
        if "_orbit_cache" not in self.__dict__:
            found: dict[str, dict[str, Slot | BiasSlot]] = {}
            for name, site in self.sites().items():
                for task, slot in site.slots().items():
                    if isinstance(slot, (Slot, BiasSlot)):
                        found.setdefault(task, {})[name] = slot
            modules = super().slots()
            self.__dict__["_orbit_cache"] = {**{t: Whole(slots) for t, slots in found.items()}, **modules}
        return self.__dict__["_orbit_cache"]

    def carries(self, task: str) -> bool:
        return task in self.slots() and not isinstance(self.slots()[task], Whole)

    def owners(self, task: str) -> dict[str, nn.Module]:
        return super().owners(task) if self.carries(task) else {}

    def owners_device(self) -> torch.device:
        for site in self.sites().values():
            return site.owners_device()
        return super().owners_device()

    def banks(self) -> tuple[str, ...]:
        return (*super().banks(), *((SITES,) if SITES in self._modules else ()))

    def new_whole(self, configs: Mapping[str, LayerConfig]) -> Whole:
        """Fresh owners for a task that changes these parameters, not yet attached.

        Raises:
            ConfigError: dropout, or DoRA of experts. GraftError: a parameter that is no dense matrix.
        """
        slots = {}
        for name, config in configs.items():
            site = ParameterSite(self, name)
            slots[name] = site.new_slot(config)
            initialise(site, slots[name], config.init)
        return Whole(slots)

    def new_bias(self) -> AnySlot:
        return Whole({"bias": ParameterSite(self, "bias").new_bias()})

    def put_task(self, task: str, slot: AnySlot) -> None:
        if not isinstance(slot, Whole):
            super().put_task(task, slot)
            return
        for name, one in slot.slots.items():
            site = self.make_site(name)
            site.put_task(task, one)
            self._orbit_route.attach(site)
        self.__dict__.pop("_orbit_cache", None)

    def make_site(self, name: str) -> Graft:
        """The site of this parameter, made if there is none."""
        if SITES not in self._modules:
            self.add_module(SITES, Tasks())
        container = self._bank(SITES)
        if name not in container:
            container.put(name, ParameterSite(self, name))
        return container.get(name)

    def drop_task(self, task: str) -> None:
        for name, site in self.sites().items():
            if task in site.slots():
                site.drop_task(task)
            if isinstance(site, ParameterSite) and not site.slots():
                self._orbit_route.detach(site)
                self._bank(SITES).discard(name)
        if SITES in self._modules and not len(self._bank(SITES)):
            del self._modules[SITES]
        super().drop_task(task)


class SequentialGraft(WholeGraft, nn.Sequential):
    """The mixin for `nn.Sequential`, whose children are counted and indexed."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(_shell(self, {}))  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(_shell(self, {}))  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return _shell(self, {})[index]  # type: ignore[index]


class ParameterSite(Graft):
    """Holds the owners of one parameter of `host`, and stands for it wherever layers are listed."""

    STARTS = True

    _orbit_host: WholeGraft
    parameter: str

    def __init__(self, host: WholeGraft, name: str) -> None:
        super().__init__()
        # The host is kept out of the registered modules: it contains this one.
        self.__dict__.update(
            _orbit_host=host,
            parameter=name,
            _orbit_route=host._orbit_route,
            _orbit_plan=None,
            _orbit_merged=None,
        )

    def home(self) -> tuple[nn.Module, str]:
        return self._orbit_host, self.parameter

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        return dense_weight(self)

    @property
    def transposed(self) -> bool:
        """Is the parameter stored as (n, in, out)?"""
        return bool(getattr(self._orbit_host, "is_transposed", False)) and dense_weight(self).dim() == 3

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the matrix, of each expert's where there are experts."""
        out, into = dense_weight(self).shape[-2:]
        return (into, out) if self.transposed else (out, into)

    def matrix(self) -> Tensor:
        W = dense_weight(self).detach()
        W = W.to(dora.wide(W.dtype))
        return W.mT if self.transposed else W

    def factors(self, slot: Slot) -> tuple[Tensor, Tensor]:
        A, B, n = slot.down.weight, slot.up.weight, slot.up.experts
        if dense_weight(self).dim() == 2:
            return A, B
        return A.view(n, slot.up.r, -1), B.view(B.shape[0], slot.up.r, n).permute(2, 0, 1)

    def set_factors(self, slot: Slot, A: Tensor, B: Tensor) -> None:
        with torch.no_grad():
            own_A, own_B = self.factors(slot)
            own_A.copy_(A)
            own_B.copy_(B)

    def new_slot(self, config: LayerConfig) -> Slot:
        W = dense_weight(self)
        _refuse_config(config, self.parameter, W)
        n = W.shape[0] if W.dim() == 3 else 1
        out, into = self.matrix_shape()
        device = execution_device(self)
        dtype = dora.wide(W.dtype)
        A, B = fresh_factors(into, out, config.r * n, device=device, dtype=dtype)
        slot = Slot(Down(A), Up(B, config.alpha, config.rslora, experts=n))
        if config.gated:
            slot = slot._replace(gate=Gate(torch.ones((), device=device, dtype=dtype)))
        if config.dora:
            with weights_at_hand(self):
                slot = slot._replace(magnitude=Magnitude(_row_norm(self.matrix()).to(dtype)))
        return slot

    def new_bias(self) -> BiasSlot:
        return BiasSlot(Bias(dense_weight(self).detach().clone()))

    def renorm(self, slot: Slot) -> None:
        assert slot.magnitude is not None
        with torch.no_grad(), weights_at_hand(self):
            slot.magnitude.weight.copy_(
                _row_norm(adapted_weight(self, slot._replace(magnitude=None), rounded=False))
            )

    def merged_weight(self, slot: Slot) -> Tensor:
        if dense_weight(self).is_meta:
            raise MergeError(f"{self.parameter} is offloaded; merge before the model is")
        try:
            with torch.no_grad():
                return adapted_weight(self, slot)
        except GraftError as error:
            raise MergeError(str(error)) from None

    def only_ours(self, task: str) -> bool:
        return self.not_for_peft(task) is not None or super().only_ours(task)

    def not_for_peft(self, task: str) -> str | None:
        slot = self.slots()[task]
        if not isinstance(slot, Slot):
            return None
        if slot.magnitude is not None:
            return f"PEFT has no DoRA for {self.parameter}"
        if self.parameter in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return "PEFT refuses attention with separate projections (kdim, vdim)"
        return None

    def stacked(self, slot: Slot, start: Slot) -> tuple[Tensor, Tensor]:
        (A, B), n = self.update(slot), slot.up.experts
        if n == 1:
            return A, B
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)

    def merge(self, task: str) -> None:
        super().merge(task)
        self._orbit_host._orbit_merged = task

    def unmerge(self) -> None:
        super().unmerge()
        self._orbit_host._orbit_merged = None

    def extra_repr(self) -> str:
        return self.parameter


ParameterSite._orbit_original = ParameterSite  # type: ignore[attr-defined]  # what remains without tasks


def adapted_weight(layer: Graft, slot: Slot, *, rounded: bool = True) -> Tensor:
    """W' of a layer under one task, with gradients to the task's tensors.

    Args:
        rounded: give it in the dtype of W; else in at least float32.

    Raises:
        GraftError: the weight is not dense, or not there.
    """
    W = dense_weight(layer)
    refuse_meta(slot.down.weight, W)
    dtype = dora.wide(W.dtype)
    kind = "cpu" if W.is_meta else W.device.type
    with torch.autocast(kind, enabled=False):
        delta = layer.delta_in(dtype, slot)
        if getattr(layer, "transposed", False):
            delta = delta.mT
        V = W.to(dtype) + delta
        if slot.magnitude is not None:
            # A layer of its own kind has its own formula, by which m was made: a fresh one is 1 to the bit.
            n = _row_norm(V.detach()) if isinstance(layer, ParameterSite) else layer.row_norm(slot)  # type: ignore[operator]
            V = dora.ratio(slot.magnitude.weight.to(dtype), n.to(dtype))[:, None] * V
    return V.to(W.dtype) if rounded else V


def _changed(name: str, site: Graft, slot: Slot | BiasSlot, *, rounded: bool = True) -> dict[str, Tensor]:
    """The tensors that a task puts in the place of parameters of the host, by their names there.

    Args:
        name: the site's name at its host: that of a parameter, with the name of the layer that has it before.
        rounded: give weights in their dtype, else in at least float32.
    """
    path = name.rpartition(".")[0]
    found = {} if isinstance(slot, BiasSlot) else {name: adapted_weight(site, slot, rounded=rounded)}
    if slot.bias is not None:
        b = slot.bias.weight
        found[f"{path}.bias" if path else "bias"] = b if rounded else b.to(dora.wide(b.dtype))
    return found


def dense_weight(layer: Graft) -> Tensor:
    """The weight that a layer adapts.

    Raises:
        GraftError: it is quantised, derived, sharded or offloaded, so that no other can be computed from it.
    """
    module, name = layer.home()
    W = module._parameters.get(name)
    if W is None or type(W) not in (Tensor, nn.Parameter) or not W.is_floating_point():
        raise GraftError(
            f"{name} of {own_class(module).__name__} is quantised, derived or sharded; only a dense one can be "
            "replaced for a forward"
        )
    return W


def _row_norm(V: Tensor) -> Tensor:
    return V.square().sum(-1).sqrt()


def _refuse_config(config: LayerConfig, name: str, W: Tensor) -> None:
    if W.dim() not in (2, 3):
        raise GraftError(f"{name} has the shape {tuple(W.shape)}; a matrix or a stack of them is needed")
    if config.dropout:
        raise ConfigError(
            f"dropout={config.dropout} cannot be had for {name}: its update is added to the weight, so that there is "
            "no input to drop from; set dropout=0, or leave it out"
        )
    if config.dora and W.dim() == 3:
        raise ConfigError(
            f"DoRA is not defined for the stacked weights of {name}; set dora=False, or leave it out"
        )


_NOTHING = object()


def _shell(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """An object that looks like `module` with other tensors in the place of parameters."""
    shell = object.__new__(own_class(module))
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    shell.__dict__.update(module.__dict__, _parameters={**module._parameters, **own})
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, dot, rest = name.partition(".")
        if dot:
            below.setdefault(child, {})[rest] = tensor
    children = {child: _shell(module._modules[child], inside) for child, inside in below.items()}  # type: ignore[arg-type]
    hidden = module.banks() if isinstance(module, Graft) else ()
    kept = {name: child for name, child in module._modules.items() if name not in hidden}
    shell.__dict__["_modules"] = {**kept, **children}
    return shell


register_whole_kind(nn.Sequential, SequentialGraft)
register_whole_kind(nn.Module, WholeGraft)

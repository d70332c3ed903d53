"""The graft: a layer that carries tasks and is still its layer.

Its class becomes a generated subclass; its parameters keep their names, shapes and storage; each task's
tensors live in owner modules beside them (`owners.py`). Removing the last task restores the class it had. A
wrapper module would rename every parameter and be silently wrong wherever somebody reads `layer.weight`.

`Graft` holds what every kind needs: the forward, tasks, copying, loading, the merged weight. A kind adds what a
task's tensors mean for it (`linear.py`). State on the layer, all of it in `__dict__`:

    _orbit_route    the RouteState of the model, shared by its layers
    _orbit_plan     what the forward uses now (`plan.py`)               (set by the RouteState)
    _orbit_merged   the task that is merged into the weight, or None
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from orbit.adapter.config import LayerConfig
from orbit.adapter.dora import wide
from orbit.adapter.errors import GraftError, RouteError
from orbit.adapter.filed import Filed
from orbit.adapter.kinds.registry import grafted_bases, whole_kind
from orbit.adapter.owners import OTHERS, AnySlot, BiasSlot, ModuleSlot, Slot, Tasks, TokenSlot, Whole, escape
from orbit.adapter.routes.mixing import mixed
from orbit.adapter.routes.plan import Mix, Plan, Touched, plan_of
from orbit.adapter.routes.ranks import touched
from orbit.adapter.routes.replay import in_backward
from orbit.adapter.routes.state import RouteState

_BACKUP = "_orbit_backup_"  # and a parameter's name: what it was before merging, a non-persistent buffer
# Derived, and made anew by copies.
_TRANSIENT = ("_orbit_plan", "_orbit_cache", "_orbit_kept", "_orbit_age", "_orbit_w2")


class Graft(Filed, nn.Module):
    """What a grafted layer is besides its own class. Kinds derive from it and from their class of torch.

    Attributes:
        BANKS: the names of the containers of owners, in the order of Slot's fields (others': `owners.OTHERS`).
        LINEAR: does the layer map (…, in) to (…, out)? Such layers are adapted where no target is named.
        FORWARDS: the methods that compute the layer's output; a subclass with one of its own is looked at
            (`registry.grafted_bases`).
        STARTS: does `one` take the start of a slot into account?
    """

    BANKS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_magnitude", "lora_gate", "lora_bias")
    LINEAR: ClassVar[bool] = False
    FORWARDS: ClassVar[tuple[str, ...]] = ("forward",)
    STARTS: ClassVar[bool] = False

    _orbit_route: RouteState
    _orbit_plan: Plan
    _orbit_merged: str | None

    # -- the forward -----------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.current_plan()
        if plan is None:  # nearly always, and not worth a call more
            return super().forward(*args, **kwargs)
        return self._by_plan(plan, *args, **kwargs)

    def _by_plan(self, plan: Plan, *args: Any, **kwargs: Any) -> Any:
        """The output under a plan."""
        if plan is None:
            return self.base(*args, **kwargs)
        if type(plan) is Mix:
            if plan.weights.requires_grad and not torch.is_grad_enabled():
                self._orbit_route.refuse_lost_gradient(self)
            return self.mixed(plan, *args, **kwargs)
        if type(plan) is Touched:
            return touched(self._by_plan(plan.plan, *args, **kwargs), plan.others)
        return self.adapted(plan, *args, **kwargs)  # type: ignore[arg-type]

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward."""
        return super().forward(*args, **kwargs)

    def adapted(self, slot: AnySlot, *args: Any, **kwargs: Any) -> Any:
        """The output under one task."""
        if type(slot) is ModuleSlot:
            return slot.module(*args, **kwargs)
        return self.one(slot, *args, **kwargs)  # type: ignore[arg-type]

    def mixed(self, mix: Mix, *args: Any, **kwargs: Any) -> Any:
        """The output under several tasks; a kind with a faster way than `mixing.mixed` overrides it."""
        return mixed(self, mix, args, kwargs)

    def fitted(self, mix: Mix, input: Tensor, axis: int = 0) -> Mix:
        """A mix of one task per row for the rows of this input, which has its batch on `axis`.

        Raises:
            RouteError: these are not the rows of the running call.
        """
        if input.is_floating_point() and input.dim() < 2:
            raise RouteError("one task per row needs a batch, and an adapted layer was given a single vector")
        if not torch.compiler.is_compiling():
            self._orbit_route.check_rows(input.shape, axis)
        return mix.fitted(input.shape[axis])

    def current_plan(self) -> Plan:
        """What this forward uses."""
        plan = self._orbit_plan
        if not torch.compiler.is_compiling():
            if in_backward():
                plan = self._orbit_route.plan_in_backward(self)
            elif self._orbit_route.owner is not None:
                self._orbit_route.refuse_stranger()
        if self._orbit_merged is not None and self.training and torch.is_grad_enabled():
            raise RouteError(
                f"task {self._orbit_merged!r} is merged into the weights, and training would apply it twice; "
                "unmerge first, or call model.eval()"
            )
        return plan

    # -- what a kind provides --------------------------------------------------------------------------------

    def one(self, slot: Slot, *args: Any, **kwargs: Any) -> Any:
        """The output under one low-rank task."""
        raise NotImplementedError

    def new_slot(self, config: LayerConfig) -> Slot:
        """Fresh owners for a task, not yet attached; a fresh adapter changes nothing."""
        raise NotImplementedError

    def new_bias(self) -> AnySlot:
        """A fresh owner of the bias for a task that changes nothing else here."""
        raise NotImplementedError

    def merged_rows(self, slot: TokenSlot) -> Tensor:
        """The weight with the task's rows in place, in the weight's dtype."""
        raise NotImplementedError

    def merged_weight(self, slot: Slot) -> Tensor:
        """The weight with the task's update folded in, in the weight's dtype."""
        raise NotImplementedError

    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of `matrix`, told from the layer's settings: no task's rank may exceed either."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """The dense weight as a matrix W (out, in) of which ΔW = g·s·B·A is the update, in at least float32.

        Kinds with many weights of one shape (experts) have leading axes: (experts, out, in).
        """
        raise NotImplementedError

    def factors(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """A (…, r, in) and B (…, out, r) of that update, as views of the owners' tensors where possible."""
        raise NotImplementedError

    def set_factors(self, slot: Slot, A: Tensor, B: Tensor) -> None:
        """Write the factors back, in the shapes that `factors` gives."""
        raise NotImplementedError

    def renorm(self, slot: Slot) -> None:
        """Set the magnitude of a fresh DoRA slot to the norms of W + ΔW, so that it changes nothing."""
        raise NotImplementedError

    def update(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """The factors of ΔW = g·s·B·A with a start as extra ranks: [A; A₀] (…, R, in), [B, −B₀] (…, out, R)."""
        A, B = self.factors(slot)
        if slot.start is None:
            return A, B
        A0, B0 = self.factors(slot.start)
        return torch.cat([A, A0], -2), torch.cat([B, -B0], -1)

    def delta(self, slot: Slot) -> Tensor:
        """ΔW as a matrix (…, out, in), in at least float32 and without gradient."""
        with torch.no_grad():
            return self.delta_in(wide(slot.down.weight.dtype), slot)

    def delta_in(self, dtype: torch.dtype, slot: Slot) -> Tensor:
        """ΔW = g·s·(B·A − B₀·A₀) as a matrix (…, out, in) of this dtype, with gradients to the task's tensors."""
        A, B = self.factors(slot)
        BA = B.to(dtype) @ A.to(dtype)
        if slot.start is not None:
            A0, B0 = self.factors(slot.start)
            BA = BA - B0.to(dtype) @ A0.to(dtype)
        return slot.coefficient.to(dtype) * BA

    # -- tasks -----------------------------------------------------------------------------------------------

    def slots(self) -> dict[str, AnySlot]:
        """Every task of this layer with its owners."""
        if "_orbit_cache" not in self.__dict__:
            banks = [self._bank(bank) for bank in self.BANKS]
            found: dict[str, AnySlot] = {task: Slot(*(bank.get(task) for bank in banks)) for task in banks[0]}
            for kind, names in OTHERS.items():
                first, *others = (self._bank(name) for name in names)
                for task in [task for task in first if task not in found]:
                    found[task] = kind(first.get(task), *(bank.get(task) for bank in others))  # type: ignore[assignment]
            self.__dict__["_orbit_cache"] = found
        return self.__dict__["_orbit_cache"]

    def _bank(self, name: str) -> Tasks:
        bank = self._modules.get(name)
        return Tasks() if bank is None else bank  # type: ignore[return-value]

    def low_rank_slot(self, task: str) -> Slot:
        """The owners of a task that is known to be low-rank here."""
        slot = self.slots()[task]
        assert isinstance(slot, Slot)
        return slot

    def settings(self, task: str) -> LayerConfig:
        """The settings of a low-rank task here, as its owners have them."""
        slot = self.low_rank_slot(task)
        return LayerConfig(
            r=slot.up.r,
            alpha=slot.up.alpha,
            dropout=slot.down.dropout,
            dora=slot.magnitude is not None,
            rslora=slot.up.rslora,
            gated=slot.gate is not None,
            bias=slot.bias is not None,
        )

    def banks(self) -> tuple[str, ...]:
        """The names of the containers that hold this layer's tasks."""
        names = dict.fromkeys((*self.BANKS, *(name for names in OTHERS.values() for name in names)))
        return tuple(bank for bank in names if bank in self._modules)

    def owners(self, task: str) -> dict[str, nn.Module]:
        """The modules that hold this task's tensors, by the name of their container."""
        slot = self.slots()[task]
        assert not isinstance(slot, Whole)
        return {
            bank: owner for bank, owner in zip(self._banks_of(slot), slot, strict=True) if owner is not None
        }

    def _banks_of(self, slot: AnySlot) -> tuple[str, ...]:
        """The containers in which the owners of such a slot are, in the order of its fields."""
        return self.BANKS if isinstance(slot, Slot) else OTHERS[type(slot)]

    def carries(self, task: str) -> bool:
        """Does this layer itself hold tensors of the task? A module run as a whole leaves that to its sites."""
        return task in self.slots()

    def sites(self) -> dict[str, Graft]:
        """The layers whose owners a forward of this one reads, by the name of the tensor that they change."""
        return {}

    def home(self) -> tuple[nn.Module, str]:
        """Where the weight that is adapted is registered: a module, and the parameter's name there."""
        return self, "weight"

    def owners_device(self) -> torch.device:
        """The device of the tasks' tensors."""
        for slot in self.slots().values():
            if type(slot) is Slot:
                return slot.down.weight.device
        parameters = (
            p for task in self.slots() for owner in self.owners(task).values() for p in owner.parameters()
        )
        return next(parameters).device

    def put_task(self, task: str, slot: AnySlot) -> None:
        """Attach a task's owners."""
        assert not isinstance(slot, Whole)
        for bank, owner in zip(self._banks_of(slot), slot, strict=True):
            if owner is not None:
                if bank not in self._modules:
                    self.add_module(bank, Tasks().train(self.training))
                owner.train(self.training)
                self._bank(bank).put(task, owner)
        self.__dict__.pop("_orbit_cache", None)

    def rename_task(self, old: str, new: str) -> None:
        """Give a task another name."""
        for bank in self.banks():
            if old in self._bank(bank):
                self._bank(bank).rename(old, new)
        self.__dict__.pop("_orbit_cache", None)

    def drop_task(self, task: str) -> None:
        """Take a task's owners away."""
        for bank in self.banks():
            tasks = self._bank(bank)
            tasks.discard(task)
            if not len(tasks):
                del self._modules[bank]
        self.__dict__.pop("_orbit_cache", None)
        self.forget_stacks()
        self.__dict__["_orbit_plan"] = None

    @property
    def stacks_age(self) -> int:
        """How often what was made of the tasks' tensors was forgotten."""
        return self.__dict__.get("_orbit_age", 0)

    def forget_stacks(self) -> None:
        """The tasks' tensors may be written to in ways that leave no mark: keep nothing that was made of them."""
        self.__dict__.pop("_orbit_kept", None)
        self.__dict__["_orbit_age"] = self.stacks_age + 1

    def train(self, mode: bool = True) -> Any:
        self.forget_stacks()
        return super().train(mode)

    def point(self, route: Any) -> None:
        """Follow `route` from now on. A module that stands in for a layer goes on doing so while merged."""
        merged = self._orbit_merged
        slot = None if merged is None else self.slots().get(merged)
        self.__dict__["_orbit_plan"] = slot if type(slot) is ModuleSlot else plan_of(route, self)

    # -- merging ---------------------------------------------------------------------------------------------

    def merge(self, task: str) -> None:
        """Put W' in the place of W. The Parameter W itself is the backup, so unmerging is exact.

        A module that stands in for the layer has no W'; it stands in for good.
        """
        module = self.home()[0]
        for name, merged in self._merged_tensors(self.slots()[task]).items():
            original = module._parameters[name]
            assert original is not None
            self.register_buffer(_BACKUP + name, original, persistent=False)
            module._parameters[name] = nn.Parameter(merged, requires_grad=False)
        self._orbit_merged = task

    def _merged_tensors(self, slot: AnySlot) -> dict[str, Tensor]:
        """What a task puts in the place of parameters of `home`, by their names there."""
        name = self.home()[1]
        if isinstance(slot, BiasSlot):
            return {"bias": slot.bias.weight.detach().clone()}
        if not isinstance(slot, (Slot, TokenSlot)):
            return {}
        bias = {} if slot.bias is None else {"bias": slot.bias.weight.detach().clone()}
        return {name: self.merged_weight(slot) if isinstance(slot, Slot) else self.merged_rows(slot), **bias}

    def unmerge(self) -> None:
        """Undo `merge`."""
        module = self.home()[0]
        for key in [key for key in self._buffers if key.startswith(_BACKUP)]:
            backup = self._buffers.pop(key)
            self._non_persistent_buffers_set.discard(key)
            if not isinstance(backup, nn.Parameter):  # moved to another device or dtype meanwhile
                assert backup is not None
                backup = nn.Parameter(backup, requires_grad=False)
            module._parameters[key.removeprefix(_BACKUP)] = backup
        self._orbit_merged = None

    def backups(self) -> dict[str, Tensor]:
        """The unmerged values of this module's own parameters, by name, while a task is merged into them."""
        return {
            key.removeprefix(_BACKUP): backup
            for layer in (self, *self.sites().values())
            if layer.home()[0] is self
            for key, backup in layer._buffers.items()
            if key.startswith(_BACKUP) and backup is not None
        }

    # -- state -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, backup in self.backups().items():
            destination[prefix + name] = backup if keep_vars else backup.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        merged = [prefix + name for name in self.backups() if prefix + name in state_dict]
        if merged:
            error_msgs.append(f"{merged[0]}: task {self._orbit_merged!r} is merged into it; unmerge first")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A base checkpoint knows no tasks. A task that is there must be there with all its tensors.
        for task, slot in self.slots().items():
            wanted = [
                f"{prefix}{bank}.{escape(task)}.{name}"
                for bank, owner in self.owners(task).items()
                for name in owner.state_dict()
            ]
            absent = [name for name in wanted if name not in state_dict]
            if isinstance(slot, ModuleSlot):  # reports what it misses by itself, so it is given what it has
                if len(absent) == len(wanted):
                    own = f"{prefix}lora_module.{escape(task)}."
                    state_dict.update(slot.module.state_dict(prefix=own, keep_vars=True))
            elif len(absent) < len(wanted):
                missing_keys.extend(absent)

    def extra_repr(self) -> str:
        said = [super().extra_repr(), "" if self._orbit_merged is None else f"merged={self._orbit_merged!r}"]
        return ", ".join(part for part in said if part)

    # -- copies ----------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original_class(self),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)  # which `object` has since Python 3.11
        state = dict(self.__dict__ if inherited is None else inherited())
        for name in _TRANSIENT:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._orbit_route.attach(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        aside = {name: t for name, t in self._buffers.items() if isinstance(t, nn.Parameter)}  # while merged
        super()._apply(fn, recurse)
        for name, parameter in aside.items():
            moved = self._buffers[name]
            if moved is not None and torch._has_compatible_shallow_copy_type(parameter, moved):
                parameter.data = moved.detach()
                self._buffers[name] = parameter
        self.forget_stacks()
        if isinstance(self._orbit_plan, Mix):  # its weights lie on the former device
            self._orbit_route.attach(self)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise GraftError("nn.DataParallel copies layers without their tasks; use DistributedDataParallel")


def graft(layer: nn.Module, route: RouteState) -> None:
    """Turn `layer`, which `registry.refusal` found fit, into a Graft of the same layer, with no tasks yet."""
    cls = type(layer)
    layer.__dict__.update(_orbit_route=route, _orbit_plan=None, _orbit_merged=None)
    layer.__class__ = grafted_class(cls)
    _rebind_accelerate(layer)


def ungraft(layer: Graft) -> None:
    """Give a layer without tasks its own class back."""
    cls = original_class(layer)
    layer.__dict__["_orbit_route"].detach(layer)
    for name in ("_orbit_route", "_orbit_merged", *_TRANSIENT):
        layer.__dict__.pop(name, None)
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is keep_off_fast_path]:
        del layer._forward_pre_hooks[key]
    layer.__class__ = cls  # type: ignore[assignment]
    _rebind_accelerate(layer)


def keep_off_fast_path(layer: nn.Module, args: Any) -> None:
    """A hook that does nothing; without one `nn.TransformerEncoderLayer` reads weights around forwards."""


def grafted_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of grafted layers whose own class is `cls`."""
    if cls not in _CLASSES:
        if issubclass(cls, Graft):
            return cls  # a site, which was never anything else
        body = {"_orbit_original": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        try:
            bases = grafted_bases(cls)
        except GraftError:  # the layer as a whole
            bases = (whole_kind(cls), cls)
        if hasattr(cls, "__deepcopy__"):
            body["__deepcopy__"] = _deepcopy
        _CLASSES[cls] = type(f"Grafted{cls.__name__}", bases, body)
    return _CLASSES[cls]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a grafted layer had.

    Raises:
        GraftError: its class was changed again since (parametrizations, `fully_shard`).
    """
    original = type(layer).__dict__.get("_orbit_original")
    if original is None:
        raise GraftError(
            f"an adapted layer's class was changed after grafting, to {type(layer).__name__}; undo that first"
        )
    return original


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    grafted = grafted_class(cls)
    return grafted.__new__(grafted)


def _deepcopy(layer: Graft, memo: dict[int, Any]) -> Any:
    """A copy of a layer whose own class copies itself, as torch's parametrized ones do."""
    for name in _TRANSIENT:
        memo[id(layer.__dict__.get(name))] = None
    twin = original_class(layer).__deepcopy__(layer, memo)  # type: ignore[attr-defined]
    if isinstance(twin, Graft):
        for name in _TRANSIENT:
            twin.__dict__.pop(name, None)
        twin._orbit_route.attach(twin)
    return twin


def _rebind_accelerate(layer: nn.Module) -> None:
    # accelerate's hooks keep the forward that they found as a bound method, which would bypass the new class.
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)

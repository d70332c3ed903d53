"""The graft: a layer that carries tasks and is still its layer.

Its class becomes a generated subclass; its parameters keep their names, shapes and storage; each task's
tensors live in owner modules beside them (`owners.py`). Removing the last task restores the class it had. A
wrapper module would rename every parameter and be silently wrong wherever somebody reads `layer.weight`.

`Graft` holds what every kind needs: tasks, copying, loading, the merged weight. A kind adds its forward
(`linear.py`). State on the layer, all of it in `__dict__`:

    _orbit_route    the RouteState of the model, shared by its layers
    _orbit_slot     what the forward uses now: the current task's Slot, or None     (set by the RouteState)
    _orbit_merged   the task that is merged into the weight, or None
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter.errors import GraftError, RouteError
from orbit.adapter.kinds import grafted_bases
from orbit.adapter.owners import Slot, Tasks, escape
from orbit.adapter.replay import in_backward
from orbit.adapter.state import RouteState

BANKS = ("lora_A", "lora_B", "lora_magnitude")  # in the order of Slot's fields
_BACKUP = "_orbit_backup"  # the unmerged weight, a non-persistent buffer
_TRANSIENT = ("_orbit_slot", "_orbit_cache", "_orbit_w2")  # derived: made anew by copies


class Graft(nn.Module):
    """What a grafted layer is besides its own class. Kinds derive from it and from their class of torch."""

    _orbit_route: RouteState
    _orbit_slot: Slot | None
    _orbit_merged: str | None

    # -- tasks -----------------------------------------------------------------------------------------------

    def slots(self) -> dict[str, Slot]:
        """Every task of this layer with its owners."""
        if "_orbit_cache" not in self.__dict__:
            banks = [self._modules.get(bank, Tasks()) for bank in BANKS]
            self.__dict__["_orbit_cache"] = {
                task: Slot(*(bank.get(task) for bank in banks))  # type: ignore[union-attr, operator]
                for task in banks[0]  # type: ignore[union-attr]
            }
        return self.__dict__["_orbit_cache"]

    def banks(self) -> tuple[str, ...]:
        """The names of the containers that hold this layer's tasks."""
        return tuple(bank for bank in BANKS if bank in self._modules)

    def put_task(self, task: str, slot: Slot) -> None:
        for bank, owner in zip(BANKS, slot, strict=True):
            if owner is not None:
                if bank not in self._modules:
                    self.add_module(bank, Tasks())
                owner.train(self.training)
                self._modules[bank].put(task, owner)  # type: ignore[union-attr, operator]
        self.__dict__.pop("_orbit_cache", None)

    def drop_task(self, task: str) -> None:
        for bank in BANKS:
            tasks = self._modules.get(bank)
            if tasks is not None:
                tasks.discard(task)  # type: ignore[operator]
                if not len(tasks):  # type: ignore[arg-type]
                    del self._modules[bank]
        self.__dict__.pop("_orbit_cache", None)
        self.__dict__["_orbit_slot"] = None

    def current_slot(self) -> Slot | None:
        """The owners that this forward uses."""
        slot = self._orbit_slot
        if not torch.compiler.is_compiling():
            if in_backward():
                slot = self._orbit_route.slot_in_backward(self)
            elif self._orbit_route.owner is not None:
                self._orbit_route.refuse_stranger()
        if slot is None and self._orbit_merged is not None and self.training and torch.is_grad_enabled():
            raise RouteError(
                f"task {self._orbit_merged!r} is merged into the weights, and training would apply it twice; "
                "unmerge first, or call model.eval()"
            )
        return slot

    # -- what a kind provides --------------------------------------------------------------------------------

    def new_slot(
        self, *, r: int, alpha: float, dropout: float = 0.0, dora: bool = False, rslora: bool = False
    ) -> Slot:
        """Fresh owners for a task, not yet attached; a fresh adapter changes nothing."""
        raise NotImplementedError

    def merged_weight(self, slot: Slot) -> Tensor:
        """The weight with the task's update folded in, in the weight's dtype."""
        raise NotImplementedError

    # -- merging ---------------------------------------------------------------------------------------------

    def merge(self, task: str) -> None:
        """Put W' in the place of W. The Parameter W itself is the backup, so unmerging is exact."""
        merged = nn.Parameter(self.merged_weight(self.slots()[task]), requires_grad=False)
        original = self._parameters["weight"]
        assert original is not None
        self.register_buffer(_BACKUP, original, persistent=False)
        self._parameters["weight"] = merged
        self._orbit_merged = task

    def unmerge(self) -> None:
        """Undo `merge`."""
        backup = self._buffers.pop(_BACKUP)
        self._non_persistent_buffers_set.discard(_BACKUP)
        assert backup is not None
        if not isinstance(backup, nn.Parameter):  # moved to another device or dtype meanwhile
            backup = nn.Parameter(backup, requires_grad=False)
        self._parameters["weight"] = backup
        self._orbit_merged = None

    # -- state -----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        backup = self._buffers.get(_BACKUP)
        if backup is not None:
            destination[prefix + "weight"] = backup if keep_vars else backup.detach()

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
        if self._orbit_merged is not None and prefix + "weight" in state_dict:
            error_msgs.append(f"{prefix}weight: task {self._orbit_merged!r} is merged into it; unmerge first")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A base checkpoint knows no tasks. A task that is there must be there with all its tensors.
        for task, slot in self.slots().items():
            key = escape(task)
            wanted = [
                f"{prefix}{bank}.{key}.weight"
                for bank, owner in zip(BANKS, slot, strict=True)
                if owner is not None
            ]
            absent = [name for name in wanted if name not in state_dict]
            if len(absent) < len(wanted):
                missing_keys.extend(absent)

    # -- copies ----------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (original_class(self),), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        for name in _TRANSIENT:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._orbit_route.attach(self)

    def _replicate_for_data_parallel(self) -> Any:
        raise GraftError("nn.DataParallel copies layers without their tasks; use DistributedDataParallel")


def graft(layer: nn.Module, route: RouteState) -> None:
    """Turn `layer`, which `kinds.refusal` found fit, into a Graft of the same layer, with no tasks yet."""
    cls = type(layer)
    layer.__dict__.update(_orbit_route=route, _orbit_slot=None, _orbit_merged=None)
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
        body = {"_orbit_original": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _CLASSES[cls] = type(f"Grafted{cls.__name__}", grafted_bases(cls), body)
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


def _rebind_accelerate(layer: nn.Module) -> None:
    # accelerate's hooks keep the forward that they found as a bound method, which would bypass the new class.
    if "_old_forward" in layer.__dict__:
        layer.__dict__["_old_forward"] = types.MethodType(type(layer).forward, layer)

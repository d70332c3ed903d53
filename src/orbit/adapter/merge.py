"""Fold a task into the weights, and take it out again exactly.

    W' = W + s·B·A        or, for DoRA,        W' = m∘(W + s·B·A)/‖W + s·B·A‖

Subtracting s·B·A again would leave rounding behind (in bf16 0.02 after a hundred rounds), so the Parameter W
is set aside untouched and put back. A module that stands in for a layer (`modules.py`) has no W': while its task
is merged it stands in for good. While a task is merged the model's `state_dict()` is still that of the
unmerged model, no route can be taken, and a training forward raises.
"""

from __future__ import annotations

from torch import Tensor, nn

from orbit.adapter.errors import MergeError, RouteError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import bare, base_state_dict, task_layers, tasks, unwrapped
from orbit.adapter.owners import AnySlot, ModuleSlot, Slot, TokenSlot
from orbit.adapter.routes.route import find_state, state_of


def merge(model: nn.Module, name: str | None = None, *, untie: bool = False) -> None:
    """Fold a task into the weights of its layers.

    Args:
        model: a model with tasks.
        name: the task; None means the current one.
        untie: allow merging a weight that other modules share. The merged layer then has a weight of its own
            until `unmerge`, and the others keep theirs.

    Raises:
        TaskError: no such task. MergeError: merged already, no task is current, a weight that is shared or
        that is not a plain dense one, a mixture that needs the weights. RouteError: a call or a `with route`
        is running. The model is unchanged.
    """
    model = unwrapped(model)
    state = state_of(model, name)
    name = state.current if name is None and isinstance(state.current, str) else name
    if name is None:
        raise MergeError(
            f"no single task is current, so say which to merge: {', '.join(map(repr, tasks(model)))}"
        )
    layers = task_layers(model, name)
    if state.merged is not None:
        raise MergeError(f"task {state.merged!r} is merged already; unmerge it first")
    for expert, why in state.pinned.items():
        raise MergeError(f"task {expert!r} is {why}; nothing can be merged into the weights until then")
    if state.busy:
        raise RouteError(f"task {name!r} cannot be merged while a call or a `with route` is running")
    if not untie:
        for path, layer in layers.items():
            shared = _sharers(model, layer) if isinstance(layer.slots()[name], (Slot, TokenSlot)) else []
            if shared:
                raise MergeError(
                    f"{path}.weight shares its storage with {', '.join(shared)}, which would change too; "
                    "pass untie=True to give the merged layer its own weight"
                )
    done: list[Graft] = []
    try:
        for path, layer in layers.items():
            try:
                layer.merge(name)
            except MergeError as error:
                raise MergeError(f"layer {path!r} cannot be merged: {error}") from None
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    state.set_merged(name)


def unmerge(model: nn.Module) -> None:
    """Undo `merge`: the very Parameters that the layers had, and the route that was current.

    Raises:
        MergeError: nothing is merged.
    """
    model = unwrapped(model)
    state = find_state(model)
    if state is None or state.merged is None:
        raise MergeError("nothing is merged into this model")
    for layer in task_layers(model, state.merged).values():
        layer.unmerge()
    state.set_merged(None)


def merged(model: nn.Module) -> str | None:
    """The task that is merged into the model's weights, or None."""
    state = find_state(model)
    return None if state is None else state.merged


def refuse_merged(model: nn.Module, name: str) -> None:
    """Raise MergeError if the task is merged: its tensors are not what the model computes with."""
    if merged(model) == name:
        raise MergeError(
            f"task {name!r} is merged into the weights, which loading would not change; unmerge it first"
        )


def merged_state_dict(model: nn.Module, name: str | None = None, *, untie: bool = False) -> dict[str, Tensor]:
    """The state dict of the base model with a task folded in: base names, no adapters.

    For `model.save_pretrained(folder, state_dict=merged_state_dict(model, "math"))`, or to load into a fresh base
    model. The model itself stays as it is; the folded weights are new tensors and the others are the model's own.

    Args:
        model: a model with tasks.
        name: the task; None means the merged one, else the current one.
        untie: allow a task on a weight that other modules share. Their entries keep the old weight, so a model that
            ties them again on loading would lose one or the other.

    Raises:
        TaskError, MergeError, RouteError: as `merge`, and if another task is merged.
    """
    model = bare(model)
    before = merged(model)
    if before is not None and name not in (None, before):
        raise MergeError(f"task {before!r} is merged already; unmerge it first")
    state = base_state_dict(model)
    if before is None:
        merge(model, name, untie=untie)
    try:
        for key, parameter in model.named_parameters(remove_duplicate=False):
            if key in state:
                state[key] = parameter.detach()
        for path, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, Graft) and layer._orbit_merged is not None:
                _put_stand_in(state, path, layer.slots().get(layer._orbit_merged))
    finally:
        if before is None:
            unmerge(model)
    return state


def _put_stand_in(state: dict[str, Tensor], path: str, slot: AnySlot | None) -> None:
    """Write the tensors of the module that stands in for a layer in the place of the layer's own."""
    if isinstance(slot, ModuleSlot):
        own = {f"{path}.{key}" if path else key: value for key, value in slot.module.state_dict().items()}
        for key in own:
            if key not in state:
                raise MergeError(
                    f"layer {path!r} is a {type(slot.module).__name__} under this task, and the base model has no "
                    f"place for its {key}; save the task by itself"
                )
        state.update(own)


def _sharers(model: nn.Module, layer: Graft) -> list[str]:
    """Names of the other parameters that lie in the storage of the layer's weight."""
    home, own_name = layer.home()
    weight = home._parameters.get(own_name)
    if weight is None or not _is_plain(weight):
        return []
    own = weight.untyped_storage().data_ptr()
    return [
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
        and _is_plain(parameter)
        and not (module is home and key == own_name)
        and own != 0
        and parameter.untyped_storage().data_ptr() == own
    ]


def _is_plain(weight: Tensor) -> bool:
    """Does it have a storage of its own kind? Meta tensors and tensor subclasses do not."""
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta

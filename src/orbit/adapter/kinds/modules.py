"""Modules that stand in for a layer under one task.

    register_base_module_wrapper(cls, constructor)    the module that `constructor` makes, once per task
    AdapterConfig(save_modules=("score",))            a copy of the module, trained whole; the base keeps its own

A constructor is given a shell of the layer: an object of a subclass of the layer's class that shares the layer's
`__dict__`, so that calling it is the layer's own forward, without adapters and without the hooks, which the layer
itself runs. The module may keep it, or modules and parameters below it: they are moved out of what is registered,
so that the module's parameters and `state_dict()` are the task's alone. (Keep modules rather than parameters:
`load_state_dict(assign=True)` replaces the latter.) Nothing below such a layer is adapted.

That a new task changes nothing is here the constructor's promise: it should start as the layer itself.

The constructor is called and not kept, so a lambda does not stand in the way of pickling; the classes of the
modules it makes must be found by pickle, as always.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from orbit.adapter.errors import GraftError, TargetError
from orbit.adapter.graft import Graft, ungraft
from orbit.adapter.kinds.registry import own_class, refusal, register_wrapper, wrapper_of
from orbit.adapter.owners import ModuleSlot
from orbit.adapter.routes.route import uninstall
from orbit.adapter.targets import matches
from orbit.core.names import did_you_mean
from orbit.core.tree import tree

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def register_base_module_wrapper(cls: type[nn.Module], constructor: Callable[[Any], nn.Module]) -> None:
    """Adapt modules of class `cls` and its subclasses by modules of your own.

    Args:
        cls: the class; where several registered classes fit a module, the most specific one counts, and one
            that is registered here goes before the library's own kind of the same class.
        constructor: `constructor(layer)` gives a new module that takes the layer's arguments and gives its outputs.

    Raises:
        GraftError: `cls` is no class of modules, or `constructor` cannot be called.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or cls in (nn.Module, *_CONTAINERS):
        raise GraftError(f"a class of modules that have a forward can be registered, not {cls!r}")
    if not callable(constructor):
        raise GraftError(f"the constructor for {cls.__name__} must be callable, got {constructor!r}")
    register_wrapper(cls, constructor)


def wrapped(layer: Graft) -> ModuleSlot:
    """A new module of the task from the constructor that is registered for the layer's class.

    Raises:
        GraftError: the constructor gave no module of its own.
    """
    constructor = wrapper_of(layer)
    assert constructor is not None
    _refuse_split(layer)
    module = constructor(shell_of(layer))
    theirs = {id(m) for m in layer.modules()}
    if not isinstance(module, nn.Module) or id(module) in theirs or isinstance(module, Shell):
        raise GraftError(
            f"the constructor for {own_class(layer).__name__} must give a new module, and gave "
            f"{'the layer itself' if isinstance(module, nn.Module) else repr(module)}"
        )
    tensors = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    _disown(module, theirs, set(tensors))
    for tensor in tensors.values():
        return ModuleSlot(module.to(tensor.device))
    return ModuleSlot(module)


def saved(layer: nn.Module) -> ModuleSlot:
    """A copy of a module for one task, without any adapters and hooks, trainable."""
    _refuse_split(layer)
    twin = copy.deepcopy(layer)
    for inside in [module for module in twin.modules() if isinstance(module, Graft)]:
        for task in tuple(inside.slots()):
            inside.drop_task(task)
    for inside in [module for module in twin.modules() if isinstance(module, Graft)]:
        uninstall(twin, inside._orbit_route)
        ungraft(inside)
    twin._forward_hooks.clear()  # the layer itself runs its hooks
    twin._forward_pre_hooks.clear()
    return ModuleSlot(twin.requires_grad_(True))


def resolve_saved(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `save_modules` names, by dotted name.

    Raises:
        TargetError: a name that matches nothing, or a module that cannot be replaced where it stands.
    """
    modules, parents = tree(model)
    found: dict[str, nn.Module] = {}
    for name in names:
        hits = matches(name, modules)
        if not hits:
            known = {path.rpartition(".")[2] for path in modules if path}
            raise TargetError(
                f"save_modules names {name!r}, which no module matches{did_you_mean(name, known)}"
            )
        for path in hits:
            module = modules[path]
            why = refusal(module, parents[path], whole=True)
            if path == "":
                why = "it is the whole model"
            elif isinstance(module, _CONTAINERS):
                why = f"a {type(module).__name__} is not called; name the modules in it"
            elif not any(True for _ in module.parameters()):
                why = "it has no parameters to train"
            if why is not None:
                raise TargetError(f"module {path!r} cannot be trained whole: {why}")
            found[path] = module
    return {path: modules[path] for path in modules if path in found}


def _refuse_split(layer: nn.Module) -> None:
    # Part of such a layer's forward runs before the place where tasks take over, and would run twice.
    if isinstance(layer, Graft) and not issubclass(type(layer).__mro__[1], Graft):
        raise GraftError(
            f"{own_class(layer).__name__} changes its input before it calls the forward of its base class, "
            "so no module can stand in for it"
        )


class Shell(nn.Module):
    """The base layer as a constructor sees it; its classes are made by `shell_of`."""

    __slots__ = ("_orbit_layer",)  # not in `__dict__`, which is the layer's
    _orbit_layer: Graft

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._orbit_layer.base(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return shell_of, (self._orbit_layer,)


def shell_of(layer: Graft) -> Any:
    """A shell of `layer`."""
    cls = own_class(layer)
    if cls not in _SHELLS:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _SHELLS[cls] = type(cls.__name__, (Shell, cls), body)
    shell = object.__new__(_SHELLS[cls])
    object.__setattr__(shell, "_orbit_layer", layer)
    shell.__dict__ = layer.__dict__
    return shell


_SHELLS: dict[type[nn.Module], type[nn.Module]] = {}


def _disown(module: nn.Module, modules: set[int], tensors: set[int]) -> None:
    """Keep the base's modules and tensors as plain attributes of `module` and what is below it."""
    for name, child in list(module._modules.items()):
        if child is not None and (id(child) in modules or isinstance(child, Shell)):
            if isinstance(module, (nn.Sequential, *_CONTAINERS)):
                module._modules[name] = _Reference(child)
            else:
                module.__dict__[name] = module._modules.pop(name)
    registry: dict[str, Any]
    for registry in (module._parameters, module._buffers):
        for name in [name for name, tensor in registry.items() if id(tensor) in tensors]:
            module.__dict__[name] = registry.pop(name)
    for child in module.children():
        _disown(child, modules, tensors)


class _Reference(nn.Module):
    """Holds a module of the base in a container of the task, without registering it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)

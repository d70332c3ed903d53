"""Which layers can be adapted, and where the adapter's forward goes in their class.

A kind is a class of torch and the mixin that adapts it: Linear, Conv1d/2d/3d, Embedding, and transformers'
Conv1D, which is known by its path alone until a model has one. A layer of a subclass is grafted by its forward:

    nn.Linear's own          class Grafted(LinearGraft, Sub)     the branch sees what the layer sees
    calls super().forward    class Grafted(Sub, LinearGraft)     the branch sees what the subclass passes on
    neither                  refused, unless the class is known to compute its kind's map in a way of its own

A known class is one whose branch may stand in front: quantised linears, and a few rewritten ones. "Its kind's
map" is x·Wᵀ + b, the convolution, the row of W; always linear in W, or an update of W would mean something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from orbit.adapter.errors import GraftError

if TYPE_CHECKING:
    from orbit.adapter.graft import Graft

_KINDS: dict[type[nn.Module], type[Graft]] = {}
_WHOLE: dict[type[nn.Module], type[Graft]] = {}
_WRAPPERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}
_KINDS_BY_PATH: dict[str, type[Graft]] = {}  # of packages that may not be installed, and are not imported

# Forwards of their own that still compute their kind's map.
_IN_FRONT = {
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
}


def register_kind(base: type[nn.Module] | str, mixin: type[Graft]) -> None:
    """Adapt layers of class `base` and its subclasses with `mixin`.

    Args:
        base: the class; or its path ("package.module.Class"), if its package should not be imported for this.
        mixin: derives from Graft and from `base`; from Graft alone, if `base` is a path.
    """
    if isinstance(base, str):
        _KINDS_BY_PATH[base] = mixin
    else:
        _KINDS[base] = mixin


def register_wrapper(cls: type[nn.Module], constructor: Callable[[Any], nn.Module]) -> None:
    """Adapt modules of class `cls` and its subclasses by modules that `constructor` makes (`modules.py`)."""
    _WRAPPERS[cls] = constructor


def wrapper_of(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    """The constructor by which `module` is adapted; None if it has none, or a kind of a nearer class."""
    return _WRAPPERS.get(_base_of(own_class(module)) or nn.Module)


def mixin_of(module: nn.Module) -> type[Graft] | None:
    """The mixin of the kind by which `module` is adapted; None if it has none, or a registered constructor."""
    return None if wrapper_of(module) is not None else _KINDS.get(_base_of(own_class(module)) or nn.Module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before it was adapted."""
    return type(module).__dict__.get("_orbit_original", type(module))


def register_whole_kind(base: type[nn.Module], mixin: type[Graft]) -> None:
    """Use `mixin` for modules of class `base` and its subclasses that are of no kind."""
    _WHOLE[base] = mixin


def whole_kind(cls: type[nn.Module]) -> type[Graft]:
    """The mixin for modules of any class, which are replaced or run with other weights as a whole."""
    return _WHOLE[_whole_base(cls)]


def register_forward(cls: type[nn.Module]) -> None:
    """Declare that the forward of `cls`, though its own, computes what its kind's does (x·Wᵀ + b, say)."""
    _IN_FRONT.add(_path(cls))


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch by which `module` would be adapted, or None."""
    return _base_of(type(module))


def is_linear(module: nn.Module) -> bool:
    """Is `module` of a kind that maps (…, in) to (…, out)?"""
    base = kind_of(module)
    return base is not None and base not in _WRAPPERS and _KINDS[base].LINEAR


def grafted_bases(cls: type[nn.Module]) -> tuple[type, ...]:
    """The bases of the class that adapts layers of class `cls`, by the rule above.

    Raises:
        GraftError: no kind, or a forward that cannot be placed.
    """
    base = _base_of(cls)
    if base is None or base in _WRAPPERS:
        raise GraftError(f"{cls.__name__} is none of the kinds that can be adapted: {_names()}")
    mixin = _KINDS[base]
    between = False
    for ancestor in cls.__mro__[: cls.__mro__.index(base)]:
        own = [name for name in mixin.FORWARDS if name in ancestor.__dict__]
        if not own:
            continue
        if _path(ancestor) in _IN_FRONT and not between:
            return (mixin, cls)
        if own != ["forward"] or not _calls_super(ancestor.__dict__["forward"]):
            raise GraftError(
                f"{_path(cls)} has a forward of its own ({_path(ancestor)}.{own[-1]}) that does not call "
                f"super().forward, so it cannot be seen where the adapter belongs; if it computes what "
                f"{base.__name__} does, declare it: orbit.adapter.register_forward({ancestor.__name__})"
            )
        between = True
    return (cls, mixin) if between else (mixin, cls)


def refusal(layer: nn.Module, parent: nn.Module | None, *, whole: bool = False) -> str | None:
    """Why this layer cannot be adapted where it stands (as a whole: by whatever class), or None if it can."""
    if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
        return "it is lazy and has no shape yet; run one batch through the model first"
    if isinstance(parent, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention reads its weight without calling it, so the adapter would have no effect"
        )
    if "_orbit_route" in vars(layer):
        return None  # adapted already, so it was fit
    if not whole and wrapper_of(layer) is None:
        try:
            grafted_bases(type(layer))
        except GraftError as error:
            return str(error)
    own = vars(layer)
    if "forward" in own and not ("_hf_hook" in own and "_old_forward" in own):
        return (
            "its forward was replaced on the instance; take that off, or adapt the model before it is put on"
        )
    if any(name.startswith("lora_") for name in layer._modules):
        return "it already has modules named lora_*, of another library"
    taken = _taken_names(layer)
    if taken:
        return f"it has attributes of its own named {', '.join(sorted(taken))}, which an adapted layer needs"
    return None


def _taken_names(layer: nn.Module) -> set[str]:
    """Names that the layer uses and its mixin would give another meaning."""
    base = _base_of(type(layer))
    if base is None or base not in _KINDS:
        base = _whole_base(type(layer))
    mixin = _KINDS.get(base) or _WHOLE[base]
    added = {name for name in dir(mixin) if not name.startswith("__") and not hasattr(base, name)}
    return added & {*dir(type(layer)), *vars(layer), *layer._modules, *layer._parameters, *layer._buffers}


def _base_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The registered class that is nearest among the ancestors of `cls`."""
    for ancestor in cls.__mro__:
        if ancestor in _KINDS or ancestor in _WRAPPERS:
            return ancestor
        mixin = _KINDS_BY_PATH.get(_path(ancestor))
        if mixin is not None:  # the first layer of this class: now it can be derived from
            _KINDS[ancestor] = type(mixin.__name__, (mixin, ancestor), {"__module__": mixin.__module__})
            return ancestor
    return None


def _whole_base(cls: type[nn.Module]) -> type[nn.Module]:
    return next(ancestor for ancestor in cls.__mro__ if ancestor in _WHOLE)


def _calls_super(forward: object) -> bool:
    code = getattr(inspect.unwrap(forward), "__code__", None) if callable(forward) else None
    return code is not None and "super" in code.co_names and "forward" in code.co_names


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _names() -> str:
    return ", ".join(dict.fromkeys(base.__name__ for base in _KINDS))

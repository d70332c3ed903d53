"""Models by name: registered with a decorator, built from a name and arguments, as configs and command lines do.

@register_model("tiny")
class Tiny(nn.Module): ...

model = build_model("tiny", width=8)

The same names are what a run's config may say: `model: {handler: tiny, model_args: {width: 8}}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from orbit.core.components import Components
from orbit.model.errors import SettingError

__all__ = ["MODEL_REGISTRY", "build_model", "list_models", "register_model"]

_M = TypeVar("_M", bound=Callable[..., nn.Module])
MODEL_REGISTRY = Components(
    "model", {"transformer": "orbit.model.decoder.transformer:transformer"}, SettingError
)


def register_model(name: str) -> Callable[[_M], _M]:
    """A decorator that registers a class, or a function that returns a model.

    Raises:
        SettingError: the name is another model's, or empty.
    """
    if not name:
        raise SettingError("a model cannot be registered without a name: @register_model('my_model')")

    def add(model: _M) -> _M:
        MODEL_REGISTRY.add(name, model)
        return model

    return add


def build_model(name: str, /, **arguments: Any) -> nn.Module:
    """The model of that name, built with these arguments.

    Raises:
        SettingError: no such model; the message has the nearest name. What the model's constructor raises.

    >>> build_model("transformer", vocab_size=50, hidden_size=32, num_layers=1, num_heads=2).config.num_kv_heads
    2
    """
    return MODEL_REGISTRY[name](**arguments)


def list_models() -> list[str]:
    """The registered names, sorted."""
    return sorted(MODEL_REGISTRY)

"""A dataset from its section of a config: `{handler: NAME, args: {...}}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit.core.components import ComponentError
from orbit.core.making import make
from orbit.core.names import did_you_mean
from orbit.data.registry import DATASET_REGISTRY

_KEYS = ("handler", "args")


def build_dataset(
    name: str, section: Mapping[str, Any], template_args: Mapping[str, Any] | None, tokenizer: Any
) -> Any:
    """The dataset `name`: what is registered as its handler, or as its name, called with its args.

    `template_args` and `tokenizer` are the model's, for datasets that take them.

    Raises:
        ComponentError: no such dataset, another key, arguments that it does not take or lacks.
        What the dataset raises.
    """
    for key in section:
        if key not in _KEYS:
            raise ComponentError(
                f"dataset {name!r} has {key!r}{did_you_mean(str(key), _KEYS)}; a dataset has: {', '.join(_KEYS)}"
            )
    handler = section.get("handler") or name
    args = dict(section.get("args") or {})
    where = f"dataset {name!r}"
    return make(DATASET_REGISTRY[handler], args, where, template_args=template_args, tokenizer=tokenizer)


def as_dataset(name: str, source: Any, template_args: Mapping[str, Any] | None, tokenizer: Any) -> Any:
    """`source` itself, or the dataset that it describes. Raises as `build_dataset`."""
    if isinstance(source, Mapping):
        return build_dataset(name, source, template_args, tokenizer)
    return source

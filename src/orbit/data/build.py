"""A dataset from its section of a config: `{handler: NAME, args: {...}, packing: 2048, cache: true}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit.core.components import ComponentError
from orbit.core.making import make
from orbit.core.names import did_you_mean
from orbit.data.once import once
from orbit.data.packing import Packed
from orbit.data.registry import DATASET_REGISTRY

_KEYS = ("handler", "args", "cache", "packing")


def build_dataset(
    name: str, section: Mapping[str, Any], template_args: Mapping[str, Any] | None, tokenizer: Any
) -> Any:
    """The dataset `name`: what is registered as its handler, or as its name, called with its args.

    `template_args` and `tokenizer` are the model's, for datasets that take them. Its samples are tokenised once
    and kept (`orbit.data.once`), unless `cache` is false. With `packing`, rows of so many tokens hold several of them
    (`orbit.data.packing`).

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
    cache, packing = section.get("cache", True), section.get("packing")
    if not isinstance(cache, bool):
        raise ComponentError(f"dataset {name!r} has cache={cache!r}: true or false")
    if packing is not None and (not isinstance(packing, int) or isinstance(packing, bool) or packing < 2):
        raise ComponentError(
            f"dataset {name!r} has packing={packing!r}: the tokens of a row, or null for none"
        )
    component, where = DATASET_REGISTRY[handler], f"dataset {name!r}"

    def made() -> Any:
        return make(component, args, where, template_args=template_args, tokenizer=tokenizer)

    settings = {**args, "template_args": template_args}
    dataset = once(made, component, settings, tokenizer) if cache else made()
    return dataset if packing is None else Packed(dataset, packing)


def as_dataset(name: str, source: Any, template_args: Mapping[str, Any] | None, tokenizer: Any) -> Any:
    """`source` itself, or the dataset that it describes. Raises as `build_dataset`."""
    if isinstance(source, Mapping):
        return build_dataset(name, source, template_args, tokenizer)
    return source

"""What a run's config may say: its sections and keys. Anything else is an error with the nearest key.

    model      model_args · tokenizer_args · template_args · attention, quantisation, compile, checkpointing
    adapter    type · the fields of that type, or null
    data       train, eval: {NAME: {handler, args}}
    collator   handler · args
    trainer    handler (or name) · driver · args · method_args
    paths, run_name, resume, strict

`args`, `model_args`, `tokenizer_args`, `template_args` and `method_args` are open: they are checked against what they
feed, where that is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orbit.config import ConfigError
from orbit.core.names import did_you_mean

OPEN: dict[str, Any] = {}  # any keys

COMPONENT = {"handler": None, "name": None, "args": OPEN}
SCHEMA: dict[str, Any] = {
    "model": {
        "handler": None,
        "model_args": OPEN,
        "tokenizer_args": OPEN,
        "template_args": OPEN,
    },
    "adapter": OPEN,
    "data": {"train": OPEN, "eval": OPEN},
    "collator": COMPONENT,
    "trainer": {**COMPONENT, "driver": None, "method_args": OPEN},
    "paths": OPEN,
    "run_name": None,
    "resume": None,
    "strict": None,
}


def check(cfg: Mapping[str, Any]) -> None:
    """ConfigError for a key that no section knows."""
    _check(cfg, SCHEMA, "")


def _check(cfg: Any, schema: Mapping[str, Any], where: str) -> None:
    if cfg is None or schema is OPEN:
        return
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{where} is {cfg!r} and must be a mapping with {', '.join(schema)}")
    for key, value in cfg.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in schema:
            raise ConfigError(
                f"unknown key {name!r}{did_you_mean(str(key), schema)}; there are: {', '.join(schema)}"
            )
        if schema[key] is not None:
            _check(value, schema[key], name)


def named(section: Mapping[str, Any] | None, where: str) -> tuple[str, dict[str, Any]]:
    """(the component's name, its arguments) of `{handler | name, args}`."""
    handler = (section or {}).get("handler") or (section or {}).get("name")
    if not isinstance(handler, str):
        raise ConfigError(f"{where} names no component: give it a handler (or name)")
    return handler, dict((section or {}).get("args") or {})

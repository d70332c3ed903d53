"""A config from its parts, by Hydra: the shipped files, the user's folder before them, overrides on top.

    cfg = compose("train", ["experiment=sft", "adapter.r=8"])          plain values, interpolations resolved
    sys.exit(on_command_line("train", argv, train))                    the same with Hydra's flags (-m, --cfg job, ...)

Sections that are open by the schema (`trainer.args`, `model.model_args`, ...) take new keys without Hydra's `+`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orbit.config import ConfigError
from orbit.core.extras import need
from orbit.core.names import did_you_mean
from orbit.pipeline.schema import OPEN, SCHEMA

_PLAIN = re.compile(r"(?P<path>[A-Za-z_][\w.\[\]-]*)=(?!=)")


def compose(name: str, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> dict[str, Any]:
    """The composed config `name`, resolved, as plain values.

    Args:
        name: "train", "eval", ...
        overrides: in Hydra's grammar: `experiment=sft`, `adapter.r=8`.
        config_dir: a folder whose files go before the shipped ones.

    Raises:
        ConfigError: no such config, an override that fits nothing, an interpolation that leads nowhere or in a circle.
    """
    need("llm", "hydra", "omegaconf")
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    search = [] if config_dir is None else [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"]
    with _told(), hydra.initialize_config_module("orbit.configs", version_base="1.3"):
        return resolved(hydra.compose(name, [*search, *opened(overrides)]))


def on_command_line(name: str, arguments: Sequence[str], run: Callable[[dict[str, Any]], Any]) -> None:
    """Call `run(cfg)` for what the command line says: once, or once a job of a sweep (`-m`). Raises as `compose`."""
    need("llm", "hydra", "omegaconf")
    import hydra

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us as they are raised
    entry = hydra.main(config_path="pkg://orbit.configs", config_name=name, version_base="1.3")(
        lambda cfg: run(resolved(cfg))
    )
    argv, sys.argv = sys.argv, [f"orbit {name}", *opened(arguments)]
    try:
        with _told():
            entry()
    finally:
        sys.argv = argv


def resolved(cfg: Any) -> dict[str, Any]:
    """Plain values of an OmegaConf config. ConfigError as in `compose`."""
    from omegaconf import OmegaConf

    with _told():
        values: Any = OmegaConf.to_container(cfg, resolve=True)
    return values


def opened(overrides: Sequence[str]) -> list[str]:
    """Overrides below an open section may name new keys.

    >>> opened(["trainer.args.eval_steps=5", "trainer.drivr=hf", "-m"])
    ['++trainer.args.eval_steps=5', 'trainer.drivr=hf', '-m']
    """
    return [f"++{text}" if _lies_open(text) else text for text in overrides]


def _lies_open(override: str) -> bool:
    match = _PLAIN.match(override)
    schema: Any = SCHEMA
    for step in match["path"].split(".")[:-1] if match else ():
        schema = schema.get(step) if isinstance(schema, Mapping) else None
        if schema is OPEN:
            return True
    return False


@contextmanager
def _told() -> Iterator[None]:
    """Hydra's errors in one line, as a ConfigError."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except MissingConfigException as error:
        options = list(error.options or ())
        wanted = str(error.missing_cfg_file)
        short = wanted.rpartition("/")[2]
        raise ConfigError(
            f"there is no config {wanted!r}{did_you_mean(short, options)}; there are: {', '.join(options)}"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        first = str(error).strip().split("\n", 1)[0]
        match = re.search(r"Could not override '(.*)'", first)
        if match:
            raise ConfigError(f"unknown key {match[1]!r}{_nearest_key(match[1])}") from error
        raise ConfigError(first) from error


def _nearest_key(path: str) -> str:
    """What was probably meant: the first step of the path that no section has."""
    schema: Any = SCHEMA
    for step in path.split("."):
        if not isinstance(schema, Mapping):
            return ""
        if step not in schema:
            return f"{did_you_mean(step, schema)}; there are: {', '.join(schema)}"
        schema = schema[step]
    return ""

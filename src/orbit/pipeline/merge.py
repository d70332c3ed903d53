"""`orbit merge`: an adapter folded into its base model, as a folder that transformers loads by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orbit.adapter import load, merged_state_dict
from orbit.config import ConfigError, load_config
from orbit.core.files import aside
from orbit.core.names import did_you_mean
from orbit.pipeline import parts


def merge(
    path: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    model: str | None = None,
    untie: bool = False,
) -> Path:
    """Write the base model with the adapter folded in, and its tokenizer, to `out`.

    Args:
        path: a run's folder, or an adapter's.
        out: a folder that is not there yet, or is empty.
        task: which adapter of the run; needed where it has several.
        model: the base model: folder or name. Default: what the run or the adapter says that it is.
        untie: allow an adapter on a weight that other layers share.

    Returns:
        `out`, which appears whole or not at all.

    Raises:
        ConfigError: there is no adapter, or more than one; no base model is known; `out` holds something.
        AdapterError: the adapter does not fit the model, or cannot be merged.
    """
    path, out = Path(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} holds something already: name a folder that is not there yet")
    folder, section = _find(path, task)
    if model is not None:
        section = {"model_args": {"pretrained_model_name_or_path": model}}
    if not section:
        raise ConfigError(f"{folder} does not say which base model it belongs to: give --model")
    base = parts.load_model(section)
    tokenizer = parts.load_tokenizer(section)
    load(base, folder, "merged")
    state = merged_state_dict(base, "merged", untie=untie)
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as partial:
        base.save_pretrained(partial, state_dict=state)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    return out


def _find(path: Path, task: str | None) -> tuple[Path, Mapping[str, Any]]:
    """(the adapter's folder, the section `model` of its base: empty if nobody says)."""
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        return path, {"model_args": {"pretrained_model_name_or_path": base}} if base else {}
    if not path.is_dir():
        near = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no run and no adapter at {path}{did_you_mean(path.name, near)}")
    found = {one.parent.name: one.parent for one in sorted(path.glob("adapters/*/adapter_config.json"))}
    if not found:
        raise ConfigError(f"{path} holds no adapter: neither adapter_config.json nor adapters/TASK")
    if task is None and len(found) > 1:
        raise ConfigError(f"{path} holds the adapters {', '.join(found)}: say --task NAME")
    if task is not None and task not in found:
        raise ConfigError(
            f"{path} holds no adapter {task!r}{did_you_mean(task, found)}; it has: {', '.join(found)}"
        )
    config = path / "config.yaml"
    section = load_config(config)["model"] if config.is_file() else {}
    return found[task] if task is not None else next(iter(found.values())), section

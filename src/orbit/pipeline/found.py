"""What a run left behind: its adapters, and the section `model` of its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orbit.config import ConfigError, load_config
from orbit.core.names import did_you_mean


def find_adapter(path: Path, task: str | None, say: str) -> tuple[Path, Mapping[str, Any]]:
    """(the adapter's folder, the section `model` of its base: empty if nobody says).

    Args:
        path: a run's folder, or an adapter's.
        task: which adapter of the run; needed where it has several.
        say: how the caller's user names a task: "--task".

    Raises:
        ConfigError: there is no adapter, or more than one.
    """
    if (path / "adapter_config.json").is_file():
        base = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        return path, {"model_args": {"pretrained_model_name_or_path": base}} if base else {}
    require_folder(path)
    found = {one.parent.name: one.parent for one in sorted(path.glob("adapters/*/adapter_config.json"))}
    if not found:
        raise ConfigError(f"{path} holds no adapter: neither adapter_config.json nor adapters/TASK")
    if task is None and len(found) > 1:
        raise ConfigError(f"{path} holds the adapters {', '.join(found)}: say {say}NAME")
    if task is not None and task not in found:
        raise ConfigError(
            f"{path} holds no adapter {task!r}{did_you_mean(task, found)}; it has: {', '.join(found)}"
        )
    config = path / "config.yaml"
    section = load_config(config)["model"] if config.is_file() else {}
    return found[task] if task is not None else next(iter(found.values())), section


def require_folder(path: Path) -> None:
    """ConfigError, with the nearest name beside it, unless there is such a folder."""
    if not path.is_dir():
        near = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"there is no run and no adapter at {path}{did_you_mean(path.name, near)}")

"""A run's folder: `runs/<experiment>/<hash of the resolved config>/`.

    config.yaml  overrides.yaml  env.json  metrics.jsonl  checkpoints/  adapters/<task>/  eval/  done.json

The same command finds its own run again: it goes on where it stood, or says that it is done.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbit.config import ConfigError, save_config
from orbit.core.files import replace_synced

_NOT_HASHED = ("paths", "run_name", "resume", "strict")  # where a run lies is not what it is


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; nothing is written before `begin`."""

    path: Path
    config: Mapping[str, Any]

    @classmethod
    def of(cls, cfg: Mapping[str, Any], experiment: str | None) -> RunFolder:
        """The folder that this config belongs to.

        Raises:
            ConfigError: a run name that leaves the folder.
        """
        paths = cfg["paths"]
        if paths.get("train_output_dir"):
            return cls(Path(paths["train_output_dir"]), cfg)
        name = cfg.get("run_name") or fingerprint(cfg)
        for part, what in ((name, "run_name"), (experiment or "train", "experiment")):
            if Path(part).is_absolute() or ".." in Path(part).parts:
                raise ConfigError(
                    f"{what} {part!r} leaves the folder of runs: give a name without '..' and '/'"
                )
        return cls(Path(paths["root"]) / (experiment or "train") / name, cfg)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def adapter(self, task: str) -> Path:
        return self.path / "adapters" / task

    def result(self) -> dict[str, Any] | None:
        """What the run came to, if it is done."""
        try:
            return json.loads((self.path / "done.json").read_text("utf-8"))
        except FileNotFoundError:
            return None

    def begin(self) -> None:
        """Write what the run is."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.path / "config.yaml")
        replace_synced(self.path / "env.json", (json.dumps(environment(), indent=1) + "\n").encode())

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run is done, and came to `result`."""
        replace_synced(self.path / "done.json", (json.dumps(result, indent=1) + "\n").encode())


def fingerprint(cfg: Mapping[str, Any]) -> str:
    """Twelve hex digits of what a run is."""
    kept = {key: value for key, value in cfg.items() if key not in _NOT_HASHED}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Versions and the machine, for whoever reads the run later."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for package in ("orbit-torch", "torch", "transformers", "datasets", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return {"python": sys.version.split()[0], "platform": platform.platform(), "packages": found}

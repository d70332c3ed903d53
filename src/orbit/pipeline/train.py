"""`orbit train`: a config to a trained model.

check the config and its folder → build tokenizer, data, objective, model, adapter → room on the disk?
→ (nothing is written until here) → folder → train → save → done
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from torch import nn

from orbit import adapter
from orbit.config import ConfigError
from orbit.core.rng import seed_everything
from orbit.data.build import build_dataset
from orbit.pipeline import orbit_driver, parts, schema
from orbit.pipeline.arguments import read_arguments
from orbit.pipeline.folder import RunFolder

TASK = "default"


def train(
    cfg: Mapping[str, Any],
    experiment: str | None = None,
    console: Console | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the training that `cfg` describes, or say that it is done. Returns what it came to.

    Args:
        experiment: the first part of the run's folder.
        console: where it says what it did.
        overrides: what the config was composed from, for the run's folder.

    Raises:
        ConfigError, UnknownComponentError, DataError: before any folder is written.
    """
    console = Console() if console is None else console
    schema.check(cfg)
    folder = RunFolder.of(cfg, experiment, overrides)
    folder.check()
    done = folder.result()
    if done is not None:
        console.print(f"{folder.path} is done: {done}", highlight=False)
        return done
    arguments = read_arguments(
        {key: value for key, value in cfg["trainer"]["args"].items() if key != "output_dir"},
        bool(cfg.get("strict")),
    )
    tokenizer = parts.load_tokenizer(cfg["model"])
    template = cfg["model"].get("template_args") or {}
    sections = cfg["data"].get("train") or {}
    if len(sections) != 1:
        raise ConfigError(f"data.train names {len(sections)} datasets ({', '.join(sections)}): give it one")
    [(name, section)] = sections.items()
    data = build_dataset(name, section, template, tokenizer)
    collate = parts.build_collator(cfg["collator"], tokenizer)
    objective = parts.build_objective(cfg["trainer"])
    seed_everything(arguments.seed)
    model = parts.load_model(cfg["model"])
    parts.adapt(model, cfg.get("adapter"), TASK)
    folder.require_room(2 * checkpoint_size(model))
    if folder.begun:
        console.print(f"{folder.path} goes on", highlight=False)
    changed = folder.begin()
    if changed:
        console.print(f"since it was begun: {', '.join(changed)}", highlight=False)
    result = orbit_driver.fit(model, objective, data, collate, arguments, folder)
    if cfg.get("adapter") is None:
        model.save_pretrained(folder.path / "model")  # type: ignore[operator]
    else:
        adapter.save(model, folder.adapter(TASK), TASK)
    folder.finish(result)
    console.print(f"{folder.path}: {result}", highlight=False)
    return result


def checkpoint_size(model: nn.Module) -> int:
    """Bytes of a checkpoint, about: the weights, and two float32 moments of what trains."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights + sum(8 * p.numel() for p in model.parameters() if p.requires_grad)

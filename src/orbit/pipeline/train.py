"""`orbit train`: a config to a trained model.

check the config and its folder → build tokenizer, data, trainer, model, adapter → room on the disk?
→ (nothing is written until here) → folder → train → save → done
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn

from orbit import adapter
from orbit.config import ConfigError
from orbit.core.ranks import on_main, shards
from orbit.core.rng import seed_everything
from orbit.data.build import build_dataset
from orbit.data.packing import Packed, check_packable
from orbit.objective import CausalLM
from orbit.pipeline import orbit_driver, parts, schema
from orbit.pipeline.arguments import read_arguments
from orbit.pipeline.folder import RunFolder
from orbit.pipeline.references import check_reference, make_reference
from orbit.pipeline.resume import resume_from
from orbit.pipeline.stepping import tasks_of
from orbit.pipeline.work import Work, driver_of, is_hf_trainer

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
        console.print(f"{folder.path} is done: {done}", highlight=False, soft_wrap=True)
        return done
    section = cfg["trainer"]
    trainer = parts.trainer_of(section)
    driver = driver_of(section.get("driver"), trainer)
    arguments = read_arguments(section.get("args") or {}, bool(cfg.get("strict")), driver)
    resume = resume_from(arguments.resume_from_checkpoint or cfg.get("resume"), driver)
    tokenizer = parts.load_tokenizer(cfg["model"])
    template = cfg["model"].get("template_args") or {}
    datasets = {
        part: {
            name: build_dataset(name, dataset, template, tokenizer)
            for name, dataset in (cfg["data"].get(part) or {}).items()
        }
        for part in ("train", "eval")
    }
    if len(datasets["train"]) != 1:
        names = ", ".join(datasets["train"])
        raise ConfigError(f"data.train names {len(datasets['train'])} datasets ({names}): give it one")
    collate = parts.build_collator(cfg["collator"], tokenizer)
    method_args = dict(section.get("method_args") or {})
    if not is_hf_trainer(trainer):
        trainer = parts.build_objective(section)
    data = next(iter(datasets["train"].values()))
    several = tasks_of(trainer, data, cfg.get("adapter"), driver)
    tasks = several or (TASK,)
    compares = check_reference(section.get("reference"), trainer)
    seed_everything(arguments.seed)
    if driver == "orbit":
        processes = orbit_driver.several_processes(arguments)  # before anything is written: one rank writes
        if processes and several:
            raise ConfigError("trainer multitask runs in one process: start it without torchrun")
    model = parts.load_model(cfg["model"])
    for task in tasks:
        parts.adapt(model, cfg.get("adapter"), task)
    if isinstance(data, Packed):
        check_packable(model, CausalLM() if is_hf_trainer(trainer) else trainer, collate)
    ref = None
    if compares:
        ref = make_reference(section.get("reference"), model, data, datasets["eval"], collate, arguments)
    folder.require_room(2 * checkpoint_size(model))
    if folder.begun:
        console.print(f"{folder.path} goes on", highlight=False, soft_wrap=True)
    work = Work(
        model=model,
        trainer=trainer,
        train=data,
        collate=collate,
        arguments=arguments,
        folder=folder,
        evals=datasets["eval"],
        tokenizer=tokenizer,
        method_args=method_args,
        ref=ref,
        resume=resume,
    )
    changed = on_main(folder.begin)
    if changed:
        console.print(f"since it was begun: {', '.join(changed)}", highlight=False, soft_wrap=True)
    if driver == "hf":
        from orbit.pipeline import hf_driver

        result = hf_driver.fit(work)
    else:
        result = orbit_driver.fit(work)
    _save(model, folder, () if cfg.get("adapter") is None else tasks)
    on_main(lambda: folder.finish(result))
    console.print(f"{folder.path}: {result}", highlight=False, soft_wrap=True)
    return result


def checkpoint_size(model: nn.Module) -> int:
    """Bytes of a checkpoint, about: the weights, and two float32 moments of what trains."""
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return weights + sum(8 * p.numel() for p in model.parameters() if p.requires_grad)


def _save(model: Any, folder: RunFolder, tasks: Sequence[str]) -> None:
    """The adapters, or of a run without any all of the model; of a sharded one every rank has a part."""
    sharded = shards.holds_shards(model)
    for task in tasks:
        if sharded:
            adapter.save(model, folder.adapter(task), task)
        else:
            on_main(partial(adapter.save, model, folder.adapter(task), task))
    if tasks:
        return
    if sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        on_main(lambda: model.save_pretrained(folder.path / "model", state_dict=whole))
    else:
        on_main(lambda: model.save_pretrained(folder.path / "model"))

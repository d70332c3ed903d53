"""Checkpoints that the disk, or somebody, has changed after they were written.

A folder with three checkpoints is damaged in one way at a time: bits flipped, files cut off, pages zeroed, files and
manifests deleted or exchanged, links that dangle. Then a run resumes there. It must go on from the newest checkpoint
that is untouched, say which ones it passed over, and if there is none refuse, with every live tensor as it was.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults.result import Result
from faults.saving import Saving
from orbit.core import CheckpointError, checkpoint, load_checkpoint

STEPS = (2, 4, 6)
Damage = Callable[[Path, random.Random], tuple[int, ...]]  # what it leaves whole, by step


def run(short: bool, seed: int) -> Result:
    chance = random.Random(seed)
    times: dict[Damage, int] = {flip_a_bit: 12 if short else 300, cut_off: 12 if short else 300}
    wrong: list[str] = []
    total = 0
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "whole"
        digests = _make(whole)
        live = Saving(Path(name) / "live", load=None)
        live.build()
        for damage in DAMAGES:
            for _ in range(times.get(damage, 3)):
                folder = Path(name) / "damaged"
                shutil.copytree(whole, folder, symlinks=True)
                left = damage(folder, chance)
                why = _resume(live, folder, left, digests)
                wrong += [f"{damage.__name__}: {why}"] if why else []
                total += 1
                shutil.rmtree(folder)
    return Result(
        "damaged_files",
        f"{times[flip_a_bit]} bit flips, {times[cut_off]} truncations, and 3 each of "
        + ", ".join(damage.__name__.replace("_", " ") for damage in DAMAGES if damage not in times),
        f"{total - len(wrong)}/{total} went on from the newest whole checkpoint, or refused where there is none"
        + "".join(f"; WRONG {line}" for line in wrong[:5]),
        not wrong,
    )


def _make(folder: Path) -> dict[int, float]:
    """Checkpoints of steps 2, 4 and 6; a number that tells the weights of each."""
    trainer = Saving(folder, steps=6, keep_previous=None)
    trainer.hook.interval = 2
    trainer.train()
    return {step: _sum(load_checkpoint(checkpoint.checkpoint_path(folder, step))["model"]) for step in STEPS}


def _sum(tensors: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.double().sum() for tensor in tensors.values()))


def _resume(live: Saving, folder: Path, left: tuple[int, ...], digests: dict[int, float]) -> str:
    """What went wrong, or ""."""
    before = {key: value.clone() for key, value in live.model.state_dict().items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = checkpoint.latest_checkpoint(folder)
            assert found is not None
            live.load_state_dict(load_checkpoint(found))
        except CheckpointError as error:
            changed = any(not torch.equal(v, before[k]) for k, v in live.model.state_dict().items())
            return "live tensors changed" if changed else f"refused: {error}" if left else ""
    if not left:
        return f"{found.name} was loaded and none is whole"
    if live.step != max(left) or _sum(live.model.state_dict()) != digests[live.step]:
        return f"step {live.step} was loaded and {max(left)} is the newest whole one"
    skipped = [step for step in STEPS if step > max(left)]
    if skipped and not any(all(f"step_{step}" in str(w.message) for step in skipped) for w in said):
        there = [step for step in skipped if os.path.lexists(checkpoint.checkpoint_path(folder, step))]
        return f"{there} were passed over without a word" if there else ""
    return ""


def _path(folder: Path, step: int) -> Path:
    return checkpoint.checkpoint_path(folder, step)


def _change(path: Path, change: Callable[[bytearray], Any]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _any_file(folder: Path, chance: random.Random) -> Path:
    """The newest checkpoint's file, or one time in ten its manifest."""
    newest = _path(folder, 6)
    return newest if chance.random() < 0.9 else newest.with_name(f"{newest.name}.sha256")


def flip_a_bit(folder: Path, chance: random.Random) -> tuple[int, ...]:
    def flip(content: bytearray) -> None:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)

    _change(_any_file(folder, chance), flip)
    return (2, 4)


def cut_off(folder: Path, chance: random.Random) -> tuple[int, ...]:
    path = _any_file(folder, chance)
    # A manifest without its last byte still says all that it said.
    os.truncate(path, chance.randrange(path.stat().st_size - 1))
    return (2, 4)


def zeroed_page(folder: Path, chance: random.Random) -> tuple[int, ...]:
    page = 4096 * chance.randrange(_path(folder, 6).stat().st_size // 4096)

    def zero(content: bytearray) -> None:
        content[page : page + 4096] = bytes(4096)

    _change(_path(folder, 6), zero)
    return (2, 4)


def deleted(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).unlink()
    return (2, 4)


def deleted_manifest(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).with_name("checkpoint_step_6.pt.sha256").unlink()
    return (2, 4)


def exchanged_files(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _exchange(_path(folder, 4), _path(folder, 6))
    return (2,)


def exchanged_pairs(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _exchange(_path(folder, 4), _path(folder, 6))
    _exchange(*(folder / f"checkpoint_step_{step}.pt.sha256" for step in (4, 6)))
    return (2,)


def _exchange(one: Path, other: Path) -> None:
    between = one.with_name("between")
    os.replace(one, between)
    os.replace(other, one)
    os.replace(between, other)


def both_newest_corrupt(folder: Path, chance: random.Random) -> tuple[int, ...]:
    for step in (4, 6):
        _change(_path(folder, step), lambda content: content.reverse())
    return (2,)


def all_corrupt(folder: Path, chance: random.Random) -> tuple[int, ...]:
    for step in STEPS:
        _change(_path(folder, step), lambda content: content.reverse())
    return ()


def emptied(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).write_bytes(b"")
    return (2, 4)


def link_to_nothing(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).unlink()
    _path(folder, 6).symlink_to("nothing.pt")
    return (2, 4)


def link_out_of_the_folder(folder: Path, chance: random.Random) -> tuple[int, ...]:
    """To a checkpoint that is whole, manifest and all, and that this run has not written."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("checkpoint_step_6.pt", "checkpoint_step_6.pt.sha256"):
        os.replace(folder / name, elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    return (2, 4)


def folder_in_its_place(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).unlink()
    _path(folder, 6).mkdir()
    return (2, 4)


def garbled_manifest(folder: Path, chance: random.Random) -> tuple[int, ...]:
    _path(folder, 6).with_name("checkpoint_step_6.pt.sha256").write_bytes(chance.randbytes(200))
    return (2, 4)


DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    cut_off,
    zeroed_page,
    deleted,
    deleted_manifest,
    exchanged_files,
    exchanged_pairs,
    both_newest_corrupt,
    all_corrupt,
    emptied,
    link_to_nothing,
    link_out_of_the_folder,
    folder_in_its_place,
    garbled_manifest,
)

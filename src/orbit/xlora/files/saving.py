"""Writing a mixture to a folder, complete: settings, classifier and experts; `reading.py` draws it."""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
import torch.distributed as dist
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter.files import CONFIG as PEFT_CONFIG
from orbit.adapter.files import apart, contents, is_sharded, packed, whole, write_folder
from orbit.adapter.inject import adapter_parameters, task_owners
from orbit.core.runtime import is_main_process
from orbit.xlora.errors import XLoRAError
from orbit.xlora.files.base import fingerprint
from orbit.xlora.files.peft import peft_files
from orbit.xlora.files.reading import CONFIG, FORMAT, PICKLED, WEIGHTS

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel


RESUMED = "model.safetensors"  # where transformers.Trainer looks for what it resumes, by the model's names


def save(
    model: xLoRAModel,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    peft: bool = False,
    safe_serialization: bool = True,
    writes: bool = True,
) -> None:
    """Write a mixture to `folder`: a new one appears complete, in an old one each file is replaced, the config last.

    Of a model that `fully_shard` has sharded every rank must call it, and the first one writes.

    Args:
        state_dict: take the tensors from here, by the model's names, and not from the model.
        peft: write what PEFT loads, with its experts named 0, 1, …
        safe_serialization: write the classifier as safetensors, else by torch.save.
        writes: does this process write? Else it only does its part in gathering a sharded model.

    Raises:
        XLoRAError: `state_dict` lacks a tensor of the mixture, `peft=True` for what PEFT cannot hold, or the folder has
            a config of the other format.
        AdapterFileError: an expert cannot be written. OSError: from the file system.
    """
    if peft and not safe_serialization:
        raise XLoRAError("save_pretrained(peft=True) writes safetensors: leave safe_serialization=False out")
    other = folder / (CONFIG if peft else PEFT_CONFIG)
    if other.is_file():
        raise XLoRAError(
            f"{other} is there, of what was saved for {'Orbit' if peft else 'PEFT'}, and would be read for what is "
            "saved now: choose another folder, or delete that one"
        )
    if state_dict is not None:
        given = _given(model, state_dict)
        again = partial(save, folder=folder, peft=peft, safe_serialization=safe_serialization, writes=writes)
        functional_call(_Saving(model, again), given, (), tie_weights=False)
        return
    files = peft_files(model, folder) if peft else _files(model, safe_serialization)
    sharded = is_sharded(model)
    if writes and (is_main_process() or not sharded):
        write_folder(folder, files)
    else:
        deque(files, maxlen=0)
    if sharded:
        dist.barrier()


def expert_folders(names: tuple[str, ...]) -> dict[str, str]:
    """What the experts' folders are called: as the experts where that can be, also where case is not told apart."""
    found: dict[str, str] = {}
    for place, name in enumerate(names):
        plain = quote(name, safe=" ").replace(".", "%2E")
        taken = {folder.casefold() for folder in found.values()}
        found[name] = plain if len(plain) <= 100 and plain.casefold() not in taken else f"expert%{place}"
    return found


def _files(model: xLoRAModel, safe_serialization: bool) -> Iterator[tuple[str, bytes]]:
    """Names and contents, one expert at a time, and the config last."""
    digests = {}
    folders = {name: f"adapters/{folder}" for name, folder in expert_folders(model.xlora_experts).items()}
    for name, folder in folders.items():
        for file, content in packed(*contents(model, name)):
            digests[f"{folder}/{file}"] = hashlib.sha256(content).hexdigest()
            yield f"{folder}/{file}", content
    weights = {key: whole(t).cpu().contiguous() for key, t in model.xlora_classifier.state_dict().items()}
    file = WEIGHTS if safe_serialization else PICKLED
    content = to_bytes(weights, {"format": "pt"}) if safe_serialization else _pickled(weights)
    digests[file] = hashlib.sha256(content).hexdigest()
    yield file, content
    state = apart({key: whole(t).cpu().contiguous() for key, t in _trained(model).items()})
    yield RESUMED, to_bytes(state, {"format": "pt"})
    settings = model.xlora_config.as_plain()
    conf: dict[str, Any] = {
        "orbit_format": FORMAT,
        **settings,
        "adapters": folders,
        "base": fingerprint(model._xlora_original, settings["hidden_size"], model.xlora_layers()),
        "sha256": digests,
    }
    yield CONFIG, json.dumps(conf, indent=2).encode()


def _trained(model: xLoRAModel) -> dict[str, Tensor]:
    """The tensors of the classifier, and of the experts where one of them trains, by the model's names."""
    some = any(p.requires_grad for e in model.xlora_experts for p in adapter_parameters(model, e).values())
    experts = model.xlora_experts if some else ()
    return {key: tensor.detach() for key, tensor in _state(model, experts).items()}


def _state(model: xLoRAModel, experts: tuple[str, ...]) -> dict[str, Tensor]:
    """The part of the model's state_dict that is the classifier's and these experts'."""
    owners = [owner for name in experts for owner in task_owners(model, name)]
    kept = {
        id(t)
        for module in (*owners, model.xlora_classifier)
        for t in module.state_dict(keep_vars=True).values()
    }
    return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in kept}


def _pickled(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


class _Saving(nn.Module):
    """A call of `save` as a forward, for `functional_call` to run with other tensors in the model's places."""

    def __init__(self, model: xLoRAModel, save: partial[None]) -> None:
        super().__init__()
        self.model, self.save = model, save

    def forward(self) -> None:
        self.save(self.model)


def _given(model: xLoRAModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state_dict that the model has, under its names below `_Saving`."""
    given = {key.removeprefix("_orig_mod.").removeprefix("module."): t for key, t in state_dict.items()}
    missing = [key for key in _state(model, model.xlora_experts) if key not in given]
    if missing:
        raise XLoRAError(
            f"state_dict lacks {missing[0]}, and a mixture is saved with its classifier and experts"
        )
    own = model.state_dict(keep_vars=True)
    return {f"model.{key}": tensor for key, tensor in given.items() if key in own}

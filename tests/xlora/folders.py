"""A tiny base model, experts on disk, and what of a model must be the same after a failed call."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject, remove, save
from orbit.adapter.routes.route import find_state
from orbit.xlora import add_xlora_to_model, xLoRAConfig
from tests.tiny_llm import tiny_llama, tiny_tokenizer

TOKENS = torch.tensor([[3, 4, 5, 6, 7], [9, 10, 11, 12, 13]])


def base(**options: Any) -> Any:
    """A Llama of two layers and width 32, always the same."""
    return tiny_llama(tiny_tokenizer(), **options)


def write_expert(folder: Path, seed: int = 0, model: nn.Module | None = None, **config: Any) -> Path:
    """An adapter of PEFT's format, by default for `base()`."""
    model = base() if model is None else model
    inject(model, AdapterConfig(**{"r": 2, "alpha": 4, **config}), "to save")
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, "to save").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise).to(parameter))
    save(model, folder, "to save")
    remove(model, "to save")
    return folder


def experts(folder: Path, *names: str, **config: Any) -> dict[str, Path]:
    """Folders of experts with these names, each of other numbers."""
    return {
        name: write_expert(folder / f"expert_{place}", place, **config) for place, name in enumerate(names)
    }


def mixture(folders: dict[str, Path], model: Any = None, **config: Any) -> Any:
    """A mixture in eval mode whose classifier tells tokens apart."""
    settings = {"hidden_size": 32, "xlora_depth": 3, "xlora_size": 8, "layerwise_scalings": True, **config}
    made = add_xlora_to_model(base() if model is None else model, xLoRAConfig(**settings), folders)
    with torch.no_grad():
        for parameter in made.xlora_classifier.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return made.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def photograph(model: nn.Module) -> dict[str, Any]:
    """All that a failed call must leave alone: the model's class, tensors, flags, hooks and route, and the RNGs."""
    state = find_state(model)
    return {
        "class": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "storage": {key: value.data_ptr() for key, value in model.state_dict().items()},
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [len(module._forward_pre_hooks), len(module._forward_hooks), len(module._backward_hooks)]
            for name, module in model.named_modules()
        },
        "route": None if state is None else (state.default, list(state.configs)),
        "random numbers": (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what, value in before.items():
        if what == "tensors":
            assert list(value) == list(after[what])
            for key, tensor in value.items():
                assert torch.equal(tensor, after[what][key]), key
        else:
            assert value == after[what], what

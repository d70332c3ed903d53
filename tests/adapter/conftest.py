"""Tiny models, and adapters with something in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from orbit.adapter import adapter_parameters


@pytest.fixture
def llama() -> Callable[..., nn.Module]:
    """Makes a LlamaForCausalLM of 2 layers and width 32, always the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**options: object) -> nn.Module:
        settings: dict[str, object] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        torch.manual_seed(7)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **options})).eval()

    return make


@pytest.fixture
def mlp() -> Callable[[], nn.Module]:
    """Makes a small nn.Sequential with an in-place activation, always the same one."""

    def make() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def fill() -> Callable[..., None]:
    """Gives a task values as if it had been trained."""

    def fill(model: nn.Module, name: str | None = None, seed: int = 0, size: float = 0.3) -> None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(size * torch.randn(parameter.shape, generator=noise).to(parameter))

    return fill

"""MLP: its two equations, transformers' Llama block, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from orbit.model import MLP
from orbit.model.errors import SettingError


def test_plain_and_gated() -> None:
    x = torch.randn(2, 3, 4)
    plain = MLP(4, out_features=5)
    assert plain.up_proj.out_features == 16
    torch.testing.assert_close(plain(x), plain.down_proj(F.gelu(plain.up_proj(x))))
    gated = MLP(4, 6, gated=True, activation="silu")
    hidden = F.silu(gated.gate_proj(x)) * gated.up_proj(x)
    torch.testing.assert_close(gated(x), gated.down_proj(hidden))


def test_equals_llama() -> None:
    llama = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))
    mlp = MLP(16, 40, gated=True, activation="silu", bias=False)
    mlp.load_state_dict(llama.state_dict(), strict=True)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(mlp(x), llama(x), rtol=0, atol=1e-6)


def test_a_function_or_a_module_may_be_the_activation() -> None:
    x = torch.randn(3, 4)
    square = MLP(4, activation=lambda z: z.relu().square())
    torch.testing.assert_close(square(x), square.down_proj(square.up_proj(x).relu().square()))
    prelu = MLP(4, activation=nn.PReLU())
    assert "activation.weight" in prelu.state_dict()


def test_dropout_falls_on_the_hidden_layer_in_training_alone() -> None:
    mlp = MLP(4, 1000, 1, dropout=0.5, bias=False)
    with torch.no_grad():
        mlp.up_proj.weight.fill_(1.0)
        mlp.down_proj.weight.fill_(1.0)
    x = torch.ones(1, 4)
    full = mlp.eval()(x).item()
    some = mlp.train()(x).item()
    assert full == pytest.approx(1000 * F.gelu(torch.tensor(4.0)).item(), rel=1e-4)
    assert some != full
    assert some == pytest.approx(full, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "gulu"}, "did you mean 'gelu'"),
        ({"hidden_features": 0}, "hidden_features=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MLP(4, **arguments)

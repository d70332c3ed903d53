"""What Muon is for is told from the structure of a model, never from names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from orbit.adapter import AdapterConfig, inject
from orbit.model import Transformer, TransformerConfig
from orbit.optim import split
from tests.tiny_llm import tiny_llama, tiny_tokenizer


class Odd(nn.Module):
    """Names that lie about what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 8)
        self.embedding = nn.Linear(8, 8, bias=False)
        self.linear = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.positions = nn.Parameter(torch.zeros(1, 7, 8))
        self.table = nn.Parameter(torch.zeros(7, 8))
        self.experts = nn.Parameter(torch.zeros(3, 8, 8))
        self.weight = nn.Linear(8, 10)


def test_by_structure() -> None:
    found = split(Odd())
    assert found.muon == {
        "experts": "stack",
        "lm_head.weight": "matrix",
        "embedding.weight": "matrix",
        "attention.in_proj_weight": "matrix",
        "attention.out_proj.weight": "matrix",
    }
    assert {name: why for name, why in found.adamw.items() if why != "vector"} == {
        "positions": "of no linear layer",
        "table": "of no linear layer",
        "linear.weight": "embedding",
        "conv.weight": "convolution (conv=True gives it to Muon)",
        "weight.weight": "head",
    }
    assert split(Odd(), conv=True).muon["conv.weight"] == "kernel"


def test_heads() -> None:
    """As transformers names them, also tied; in a list of blocks there is none."""
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)
    found = split(GPT2LMHeadModel(config))
    assert found.adamw["transformer.wte.weight"] == "embedding"
    assert found.muon["transformer.h.0.attn.c_attn.weight"] == "matrix"
    config.tie_word_embeddings = False
    assert split(GPT2LMHeadModel(config)).adamw["lm_head.weight"] == "head"
    llama = split(tiny_llama(tiny_tokenizer()))
    assert [name for name, why in llama.adamw.items() if why == "head"] in (["lm_head.weight"], [])
    assert all("proj" in name for name in llama.muon)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    for tied in (False, True):
        ours = split(Transformer(TransformerConfig(**sizes, tie_embeddings=tied, num_experts=4)))
        assert [name for name, why in ours.adamw.items() if why == "head"] == (
            [] if tied else ["lm_head.weight"]
        )
        assert "model.layers.0.mlp.experts.gate_up_proj" in ours.muon


def test_a_head_that_comes_before_the_table_it_shares() -> None:
    model = nn.ModuleDict(
        {"out": nn.Linear(4, 9, bias=False), "table": nn.Embedding(9, 4), "h": nn.Linear(4, 4)}
    )
    model["out"].weight = model["table"].weight
    assert split(model).adamw["out.weight"] == "tied head"


def test_adapters_follow_what_they_adapt() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    inject(model, AdapterConfig(r=2, targets=["0", "1", "2"], dora=True))
    found = split(model)
    assert set(found.muon) == {"1.lora_A.default.weight", "1.lora_B.default.weight"}
    assert found.adamw["1.lora_magnitude.default.weight"] == "vector"
    assert found.adamw["2.lora_A.default.weight"] == "head"
    table = {why for name, why in found.adamw.items() if name.startswith("0.")}
    assert table == {"part of an embedding", "vector"}


def test_exclude_and_freezing() -> None:
    model = Odd()
    model.lm_head.weight.requires_grad_(False)
    found = split(model, exclude=["attention", "exp*"])
    assert set(found.muon) == {"embedding.weight"}
    assert {found.adamw[n] for n in ("experts", "attention.in_proj_weight")} == {"excluded"}
    assert "lm_head.weight" not in found.adamw
    with pytest.raises(
        ValueError, match="'atention' matches no parameter that trains; did you mean 'attention'"
    ):
        split(model, exclude=["experts", "atention"])
    with pytest.raises(ValueError, match=r"one string: give a list of names, \['attention'\]"):
        split(model, exclude="attention")

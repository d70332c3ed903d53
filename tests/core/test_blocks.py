"""Blocks are found by structure or by name; what cannot be found is an error that says where was looked."""

from __future__ import annotations

import pytest
from torch import nn

from orbit.core.blocks import BlocksError, find_blocks


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))


class Seq2Seq(nn.Module):
    """Two lists, heads that are a list of leaves, and longer lists of experts inside the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer() for _ in range(3))
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleDict({str(i): nn.TransformerDecoderLayer(4, 2) for i in range(2)})
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(9))


def test_every_outermost_list_of_equal_composed_modules() -> None:
    model = Seq2Seq()
    assert find_blocks(model) == [*model.encoder.layers, *model.decoder.layers.values()]


def test_shared_blocks_count_once_and_mixed_lists_are_looked_into() -> None:
    layer = Layer()
    assert find_blocks(nn.ModuleList([layer, layer, Layer()]))[0] is layer
    mixed = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(Layer(), Layer())])
    assert find_blocks(mixed) == list(mixed[1])
    stages = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
    assert find_blocks(stages) == [*stages[0], *stages[1]], (
        "a ModuleList cannot be called: its members are blocks"
    )


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 11}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=8))
    assert find_blocks(llama) == list(llama.model.layers)
    t5 = transformers.T5Model(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=11)
    )
    assert find_blocks(t5) == [*t5.encoder.block, *t5.decoder.block]


def test_names() -> None:
    model = Seq2Seq()
    assert find_blocks(model, ["encoder.layers"]) == list(model.encoder.layers)
    assert find_blocks(model, ["encoder.layers.[02]", "decoder.layers.1"]) == [
        model.encoder.layers[0], model.encoder.layers[2], model.decoder.layers["1"]
    ]  # fmt: skip
    assert find_blocks(model, ["layers.*"]) == find_blocks(model), "last parts; * stays within a part"
    assert find_blocks(model, ["heads.8", "heads.0"]) == [model.heads[0], model.heads[8]], (
        "in the model's order"
    )


def test_errors_say_what_was_looked_at() -> None:
    with pytest.raises(
        BlocksError, match=r"Sequential has no list .* looked at the model \(Sequential of Linear, ReLU\)"
    ):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(BlocksError, match="of which none is a list"):
        find_blocks(nn.Linear(2, 2))
    model = Seq2Seq()
    with pytest.raises(
        BlocksError, match=r"'encoder.layer' matches none of the \d+ modules.*did you mean 'encoder.layers'"
    ):
        find_blocks(model, ["encoder.layer"])
    with pytest.raises(
        BlocksError, match=r"'encoder.layers.0.experts.1' lies inside block 'encoder.layers.0'"
    ):
        find_blocks(model, ["encoder.layers.0", "experts.1"])
    model.empty = nn.ModuleList()
    with pytest.raises(BlocksError, match="are empty"):
        find_blocks(model, ["empty"])

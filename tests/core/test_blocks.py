"""Blocks are found by structure or by name; what cannot be found is an error that says where was looked."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, inject
from orbit.core.blocks import BlocksError, find_blocks, prepare
from orbit.core.options import Options, RunOptions
from orbit.engine import Engine
from tests import tiny


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


tracing = pytest.mark.filterwarnings("ignore")  # torch's own, while it traces


# ── checkpointing and compiling them ──────────────────────────────────────────────────────────────────────────────


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(x))))


def stack(kind: Callable[[], nn.Module] = Residual, length: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(kind() for _ in range(length))), nn.Linear(8, 3))


def torch_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def gradients(model: nn.Module, **call: Any) -> tuple[dict[str, Tensor], int]:
    """Every gradient by name, and the bytes that the forward kept for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    torch.manual_seed(2)
    x = torch.randn(5, 4, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x, **call).square().mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", [Residual, torch_layer])
def test_checkpointed_gradients_have_the_same_bits_and_take_less_memory(
    kind: Callable[[], nn.Module],
) -> None:
    plain, bytes_kept = gradients(stack(kind))
    model = stack(kind)
    names = list(model.state_dict())
    prepare(model, True, False)
    prepare(model, True, False)  # twice is once
    assert vars(model[1][0])["forward"].before is None
    checkpointed, fewer = gradients(model)
    assert same(checkpointed, plain)
    assert fewer < 0.5 * bytes_kept
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.zero_grad()
        model[1][0].up = None if kind is Residual else model[1][0].linear1  # the copy has its own blocks
        assert same(gradients(other)[0], plain)
        assert gradients(other)[1] == fewer


def test_checkpointed_adapters_keep_the_route_of_their_forward() -> None:
    found = []
    for checkpointed in (False, True):
        model = stack()
        for task in ("a", "b"):
            inject(model, AdapterConfig(r=2, targets=("up", "down")), task)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3) if p.requires_grad else None
        prepare(model, checkpointed, False)
        found.append([gradients(model, task=task)[0] for task in ("a", "b")])
    assert all(same(plain, other) for plain, other in zip(*found, strict=True))


def test_transformers_layers_checkpoint_themselves_and_leave_the_cache_out() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 11}
    config = transformers.LlamaConfig(**small, intermediate_size=8, attention_dropout=0.2)

    def step(checkpointed: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).train()
        prepare(model, checkpointed, False)
        ids = torch.arange(8).reshape(2, 4)
        model(ids, labels=ids).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    assert same(step(True), step(False))


def test_a_cache_that_is_handed_to_layers_in_its_place_is_left_out_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_head=2, n_layer=3, n_positions=8)

    def step(checkpointed: bool | list[str]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = transformers.GPT2LMHeadModel(config).train()
        prepare(model, checkpointed, False)
        ids = torch.arange(8).reshape(2, 4)
        model(ids, labels=ids, attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])).loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain = step(False)
    for checkpointed in (True, ["h.[02]"]):
        found = step(checkpointed)
        assert all(torch.allclose(found[n], g, rtol=1e-4, atol=1e-7) for n, g in plain.items())


@tracing
@pytest.mark.parametrize("kind", [Residual, torch_layer])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_equal_blocks_share_one_compiled_graph(kind: Callable[[], nn.Module], checkpointed: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    expected = gradients(stack(kind, 10))[0]
    model = stack(kind, 10)
    names = list(model.state_dict())
    prepare(model, checkpointed, {"backend": counter, "fullgraph": True})
    assert counter.frame_count == 0, "nothing is compiled before it is called"
    assert same(gradients(model)[0], expected)
    assert counter.frame_count == 1, "ten blocks, one graph"
    assert list(model.state_dict()) == names


@tracing
def test_compile_the_whole_model_or_named_blocks() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = stack()
    prepare(model, False, {"backend": counter, "blocks": ["1.[01]"]})
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == ["1.0", "1.1"]
    prepare(model := stack(), False, "model")
    assert [n for n, module in model.named_modules() if module._compiled_call_impl is not None] == [""]


@tracing
@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_both_faces_take_them_by_one_argument_each(face: str) -> None:
    """The bits of a run are those without; a model without blocks is an error before anything was changed."""
    plain, prepared = (run(face, stack(), **options) for options in (
        {}, {"activation_checkpointing": True, "compile": {"backend": "aot_eager"}}
    ))  # fmt: skip
    assert same(plain.state_dict(), prepared.state_dict())
    assert "forward" in vars(prepared[1][0])
    assert prepared[1][3]._compiled_call_impl is not None
    with pytest.raises(BlocksError, match="no list of equal blocks"):
        run(face, nn.Sequential(nn.Linear(8, 3)), activation_checkpointing=True)


def run(face: str, model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(4)
    if face == "trainer":
        trainer = tiny.Trainer(7, **options)
        trainer.build_model = lambda: model
        trainer.train()
        return trainer.model
    engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[], device="cpu", **options)
    engine.run(tiny.loader())
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": "layers"}, "a list of the blocks' names"),
        ({"activation_checkpointing": []}, "a list of the blocks' names"),
        ({"compile": "blocks"}, "torch.compile's arguments"),
        ({"compile": {"backend": "eager"}, "activation_checkpointing": True}, "draws other random numbers"),
    ],
)
def test_options_outside_their_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.Trainer(**options)


def test_an_unknown_argument_is_named_with_its_neighbour() -> None:
    with pytest.raises(TypeError, match=r"Engine\(\) has no argument 'complie'; did you mean 'compile'\?"):
        Engine(nn.Linear(1, 1), complie=True)
    with pytest.raises(TypeError, match=r"Trainer\(\) has no argument 'modle'"):
        tiny.Trainer(modle=1)
    assert set(Options.__annotations__) == {field.name for field in dataclasses.fields(RunOptions)}

"""Token rows of a task, against a weight with those rows and against PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import (
    AdapterConfig,
    AdapterError,
    AdapterFileError,
    ConfigError,
    GraftError,
    MergeError,
    TargetError,
    TaskError,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    combine,
    inject,
    load,
    merge,
    merged_state_dict,
    remove,
    rename,
    route,
    save,
    unmerge,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Make = Callable[..., nn.Module]
Fill = Callable[..., None]
ROWS = [5, 3, 40]


def logits(model: nn.Module, tokens: Tensor, **call: Any) -> Tensor:
    return model(input_ids=tokens, use_cache=False, **call).logits


@pytest.fixture
def seen() -> Tensor:
    """Tokens among which the rows are."""
    tokens = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(3))
    tokens[0, 2], tokens[1, 4], tokens[1, 5], tokens[2, 0] = 5, 3, 3, 40
    return tokens


def config(**settings: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 2, "targets": ("q_proj",), "tokens": ROWS, **settings})


def dense(bare: nn.Module, rows: Tensor, tied: bool, tokens: Tensor) -> Tensor:
    weight = bare.get_input_embeddings().weight.detach().index_copy(0, torch.tensor(ROWS), rows)
    weights = {"model.embed_tokens.weight": weight, **({"lm_head.weight": weight} if tied else {})}
    return functional_call(bare, weights, (tokens,), {"use_cache": False}).logits


@pytest.mark.parametrize("tied", [False, True])
def test_outputs_and_gradients_are_those_of_a_weight_with_these_rows(
    tied: bool, llama: Make, fill: Fill, seen: Tensor
) -> None:
    model, bare = (llama(tie_word_embeddings=tied).double() for _ in range(2))
    inject(model, config(targets=()))
    fill(model)
    (rows,) = adapter_parameters(model).values()
    assert rows.shape == (3, 32)
    y, true = logits(model, seen), dense(bare, rows, tied, seen)
    torch.testing.assert_close(y, true)
    pull = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    mine, theirs = (torch.autograd.grad((out * pull).sum(), rows)[0] for out in (y, true))
    torch.testing.assert_close(mine, theirs)
    assert mine.abs().amin(1).min() > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_task_is_the_base_to_the_bit(
    tied: bool, dtype: torch.dtype, llama: Make, seen: Tensor
) -> None:
    model, bare = (llama(tie_word_embeddings=tied).to(dtype).requires_grad_(False) for _ in range(2))
    inject(model, config())
    assert torch.equal(logits(model, seen), logits(bare, seen))
    assert model.model.embed_tokens.lora_tokens.get("default").weight.dtype == torch.float32


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {}])
def test_gradients_are_treated_as_torch_treats_those_of_the_weight(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(9, 4, **options, dtype=torch.float64)
    bare = copy.deepcopy(layer)
    inject(layer, AdapterConfig(targets=(), tokens=[3, 1]))
    x = torch.tensor([[1, 3, 3, 8], [1, 0, 1, 1]])
    pull = torch.randn(2, 4, 4, dtype=torch.float64)
    (layer(x) * pull).sum().backward()
    (bare(x) * pull).sum().backward()
    (rows,) = adapter_parameters(layer).values()
    torch.testing.assert_close(rows.grad, bare.weight.grad[[3, 1]])
    with torch.no_grad():
        rows.add_(1)
        bare.weight[[3, 1]] += 1
        assert torch.equal(layer(x.int()), bare(x.int()))


def test_rows_and_sums(llama: Make, fill: Fill, seen: Tensor) -> None:
    model = llama(tie_word_embeddings=True)
    inject(model, config(), "a")
    inject(model, config(tokens=[40]), "b")
    inject(model, config(tokens=(), targets=("v_proj",)), "c")
    for seed, name in enumerate("abc"):
        fill(model, name, seed)
    y = logits(model, seen, task=["b", "a", "c"])
    for row, task in enumerate("bac"):
        torch.testing.assert_close(
            y[row], logits(model, seen[row : row + 1], task=task)[0], rtol=1e-4, atol=1e-5
        )
    assert all(p.grad is None for p in model.parameters())
    logits(model, seen[:2], task=["a", None]).sum().backward()
    assert all(p.grad is None for p in adapter_parameters(model, "b").values())
    layer = nn.Embedding(9, 4, dtype=torch.float64)
    for name, rows in (("a", [1, 2]), ("b", [2])):
        inject(layer, AdapterConfig(targets=(), tokens=rows), name)
        fill(layer, name, len(rows))
    x = torch.arange(9)[None]
    base = layer(x, task=None)
    true = base + 0.5 * (layer(x, task="a") - base) - 2 * (layer(x, task="b") - base)
    torch.testing.assert_close(layer(x, tasks={"a": 0.5, "b": -2.0}), true)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_serves_all_tasks(fill: Fill) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False))
    model[2].weight = model[0].weight
    for index, name in enumerate("abc"):
        inject(model, AdapterConfig(r=2, tokens=[3, index]), name)
        fill(model, name, index)
    x = torch.arange(8).view(4, 2)
    ways: list[list[dict[str, Any]]] = [
        [{"task": name} for name in "abc"],
        [{"task": ["a", "b", None, "a"]}, {"task": ["b", None, "c", "b"]}],
        [{"tasks": {"a": 1.0, "b": 0.5}}, {"tasks": {"c": -1.0, "b": 2.0}}],
    ]
    for way in ways:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for options in way:
            with route(model, **options):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_training_moves_the_rows_alone(llama: Make, seen: Tensor) -> None:
    model, before = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True).state_dict()
    inject(model, config())
    fresh = {name: p.clone() for name, p in adapter_parameters(model).items()}
    assert sum("lora_tokens" in name for name in fresh) == 1
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    for _ in range(2):
        logits(model.train(), seen).square().sum().backward()
        check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[name]) for name, value in base_state_dict(model).items())
    assert not any(torch.equal(p, fresh[name]) for name, p in adapter_parameters(model).items())


def test_merging_is_exact_and_refuses_tied_weights(llama: Make, fill: Fill, seen: Tensor) -> None:
    for tied in (False, True):
        model = llama(tie_word_embeddings=tied)
        inject(model, config())
        fill(model)
        model.requires_grad_(False)
        before, y = copy.deepcopy(model.state_dict()), logits(model, seen)
        if tied:
            with pytest.raises(
                MergeError, match=r"embed_tokens.weight shares its storage with lm_head.weight"
            ):
                merge(model)
        merge(model, untie=tied)
        torch.testing.assert_close(logits(model, seen), y, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert torch.equal(logits(model, seen), y)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        plain = llama(tie_word_embeddings=tied)
        plain.load_state_dict(merged_state_dict(model, untie=tied))
        torch.testing.assert_close(logits(plain, seen), y, rtol=1e-4, atol=1e-5)


def test_copies_names_and_removal(llama: Make, fill: Fill, seen: Tensor) -> None:
    model = llama(tie_word_embeddings=True)
    inject(model, config(), "a")
    fill(model)
    y = logits(model, seen)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, seen), y)
        rows = [layer.lora_tokens.get("a") for layer in (twin.model.embed_tokens, twin.lm_head)]
        assert rows[0] is rows[1]
        assert rows[0] is not model.lm_head.lora_tokens.get("a")
    fresh = llama(tie_word_embeddings=True)
    inject(fresh, config(), "a")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh, seen), y)
    rename(model, "a", "b")
    assert torch.equal(logits(model, seen, task="b"), y)
    remove(model, "b")
    assert {type(m) for m in model.modules()} == {type(m) for m in llama().modules()}


@pytest.mark.parametrize(
    ("tokens", "said", "kind"),
    [
        ([64], r"has the rows 0 to 63, and none numbered 64", ConfigError),
        ([3, 3], "tokens names 3 twice", ConfigError),
        ([-1], "tokens must hold whole numbers >= 0, and -1 is none", ConfigError),
        ([1.0], "whole numbers >= 0, and 1.0 is none", ConfigError),
        ([True], "True is none", ConfigError),
        ("3", "must be a list of whole numbers", ConfigError),
        ({"embed_tokens": []}, r"tokens\['embed_tokens'\] must be a list", ConfigError),
        (
            {"embed_token": [1]},
            "tokens names 'embed_token', which no module matches; did you mean 'embed_to",
            TargetError,
        ),
        ({"norm": [1]}, "'model.norm' is a LlamaRMSNorm, no embedding or linear layer", TargetError),
        (
            {"embed_tokens": [1], "model.embed_tokens": [2]},
            r"gives 'model.embed_tokens' both \(1,\) and",
            ConfigError,
        ),
        ({"embed_tokens": [1], "lm_head": [2]}, r"both \(1,\) and \(2,\)", ConfigError),
    ],
)
def test_bad_indices_and_names(tokens: Any, said: str, kind: type[AdapterError], llama: Make) -> None:
    model = llama(tie_word_embeddings=True)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(kind, match=said):
        inject(model, config(tokens=tokens))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_what_excludes_each_other(llama: Make) -> None:
    for tied, settings, said in [
        (False, {"targets": ("q_proj", "embed_tokens")}, "'model.embed_tokens' cannot have both rows"),
        (True, {"targets": ("q_proj", "lm_head")}, "'lm_head' cannot have both rows"),
        (False, {"save_modules": ("embed_tokens",)}, "rows of 'model.embed_tokens' cannot be trained too"),
    ]:
        with pytest.raises(TargetError, match=said):
            inject(llama(tie_word_embeddings=tied), config(**settings))
    with pytest.raises(GraftError, match="max_norm"):
        inject(nn.Embedding(4, 2, max_norm=1.0), AdapterConfig(targets=(), tokens=[1]))
    two = nn.ModuleList([nn.Embedding(4, 2), nn.Embedding(4, 2)])
    with pytest.raises(TargetError, match=r"has 2 embeddings \('0', '1'\); say whose rows"):
        inject(two, AdapterConfig(targets=(), tokens=[1]))
    with pytest.raises(TargetError, match="has no embedding"):
        inject(nn.Sequential(nn.Linear(2, 2)), AdapterConfig(targets=(), tokens=[1]))
    model = llama()
    inject(model, config())
    with pytest.raises(TaskError, match="has rows of its own at layer 'model.embed_tokens'"):
        combine(model, {"default": 1.0}, "new")


class Tied(nn.Module):
    """A head that shares the embedding's weight and has a bias, as BERT's has; its parent has the bias too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight
        self.bias = self.head.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).relu())


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_rows_of_a_head_with_a_bias(bias: str, fill: Fill, tmp_path: Path) -> None:
    """(PEFT's rows of a linear layer forget its bias.)"""
    torch.manual_seed(0)
    model, other = Tied().double(), Tied().double()
    other.load_state_dict(model.state_dict())
    bare = copy.deepcopy(model)
    inject(model, AdapterConfig(r=2, targets=("body",), tokens={"embed": [3, 5]}, bias=bias))
    fill(model)
    x = torch.arange(8).view(2, 4)
    rows, body = model.embed.slots()["default"].rows.weight, model.body.slots()["default"]
    weight = bare.embed.weight.detach().index_copy(0, torch.tensor([3, 5]), rows)
    b = [bare.body.bias, bare.bias]
    if bias != "none":
        b = [body.bias.weight, model.head.slots()["default"].bias.weight]
    hidden = nn.functional.embedding(x, weight)
    W = bare.body.weight + body.coefficient * body.up.weight @ body.down.weight
    true = nn.functional.linear(nn.functional.linear(hidden, W, b[0]).relu(), weight, b[1])
    torch.testing.assert_close(model(x), true)
    leaves = list(adapter_parameters(model).values())
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (model(x), true)))
    torch.testing.assert_close(model(x, task=["default", None])[1], bare(x)[1])
    load(other, save(model, tmp_path))
    assert torch.equal(other(x), model(x))
    merge(model, untie=True)
    torch.testing.assert_close(model.eval()(x), true)
    unmerge(model)
    remove(model, "default")
    assert torch.equal(model(x), bare(x))


def test_a_head_of_its_own(llama: Make, fill: Fill, seen: Tensor) -> None:
    model = llama(tie_word_embeddings=False)
    inject(model, config(targets=(), tokens={"lm_head": [7, 9]}))
    base = logits(model, seen, task=None)
    fill(model)
    changed = (logits(model, seen) != base).any(0).any(0)
    assert changed.nonzero().flatten().tolist() == [7, 9]


# -- files ---------------------------------------------------------------------------------------------------


def theirs(bare: nn.Module, indices: Any, **fields: Any) -> Any:
    settings = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], trainable_token_indices=indices, **fields
    )
    model = peft.get_peft_model(bare, settings).eval()
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model


@pytest.mark.parametrize(
    ("tied", "indices"),
    [
        (False, ROWS),
        (True, ROWS),
        (False, {"embed_tokens": ROWS, "lm_head": [7]}),
        (True, {"embed_tokens": ROWS}),
    ],
)
def test_files_of_peft(tied: bool, indices: Any, llama: Make, seen: Tensor, tmp_path: Path) -> None:
    oracle = theirs(llama(tie_word_embeddings=tied), indices)
    oracle.save_pretrained(tmp_path / "theirs")
    model = llama(tie_word_embeddings=tied)
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model, seen), logits(oracle, seen), rtol=0, atol=1e-5)
    save(model, tmp_path / "ours")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again, seen), logits(oracle, seen), rtol=0, atol=1e-5)


def test_a_task_with_other_rows_is_not_filled(llama: Make, tmp_path: Path) -> None:
    model = llama()
    inject(model, config())
    save(model, tmp_path)
    other = llama()
    inject(other, config(tokens=[1, 2, 3]))
    with pytest.raises(
        AdapterFileError, match=r"the rows of model.embed_tokens is \(5, 3, 40\), but \(1, 2, 3\)"
    ):
        load(other, tmp_path)


@pytest.mark.parametrize("indices", [[5], [5, 3, 64], [5, 5, 3], None, {"lm_head": ROWS}, "5"])
def test_a_config_whose_indices_do_not_fit_is_refused(indices: Any, llama: Make, tmp_path: Path) -> None:
    model = llama()
    inject(model, config())
    save(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "trainable_token_indices": indices}))
    other = llama()
    before = {name: type(module) for name, module in other.named_modules()}
    with pytest.raises(AdapterError, match="indices|rows|tokens|tokens_delta has shape"):
        load(other, tmp_path)
    assert {name: type(module) for name, module in other.named_modules()} == before


def test_a_bare_embedding_round_trip(fill: Fill, tmp_path: Path) -> None:
    layer, other = nn.Embedding(9, 4), nn.Embedding(9, 4)
    other.load_state_dict(layer.state_dict())
    inject(layer, AdapterConfig(targets=(), tokens=[3]))
    fill(layer)
    load(other, save(layer, tmp_path))
    assert torch.equal(layer(torch.arange(9)), other(torch.arange(9)))

"""Biases of a task, against dense tensors written out and against PEFT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import (
    AdapterConfig,
    AdapterFileError,
    ConfigError,
    TaskError,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    combine,
    init_eva,
    inject,
    load,
    merge,
    merged_state_dict,
    param_groups,
    remove,
    rename,
    route,
    save,
    task_layers,
    unmerge,
)
from orbit.adapter.owners import BiasSlot, Slot

Fill = Callable[..., None]


class Net(nn.Module):
    """A layer of every sort that has a bias: Linear, norm, attention, convolution, head; and one that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.plain = nn.Linear(8, 8, bias=False)
        self.conv, self.head = nn.Conv1d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.conv(self.plain(x).relu().mT).mT
        return self.head(x)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model.to(dtype).eval()


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


TARGETS = {
    "linear": ("first",),
    "linear and attention": ("first", "attention"),
    "conv": ("conv",),
    "without a bias": ("plain",),
    "none": (),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "gated": {"gated": True},
    "pissa": {"init": "pissa"},
}
BIASES = {"first.bias", "norm.bias", "attention.out_proj.bias", "conv.bias", "head.bias"}


def adapt(
    targets: str = "linear", name: str = "default", dtype: torch.dtype = torch.float32, **settings: Any
) -> Net:
    model = net(dtype)
    inject(model, config(targets, **settings), name)
    return model


def assert_base(model: nn.Module, dtype: torch.dtype = torch.float32, **call: Any) -> None:
    """It computes what the bare model does, to the bit; torch picks kernels by what asks for a gradient."""
    with torch.no_grad():
        assert torch.equal(model(batch(dtype), **call), net(dtype).requires_grad_(False)(batch(dtype)))


def config(targets: str = "linear", **settings: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 2, "alpha": 3, "targets": TARGETS[targets], "bias": "all", **settings})


def changed(model: Net, task: str) -> dict[str, Tensor]:
    """W' and b_t of every layer, by the base's names, from the definition; keeps the gradients."""
    found: dict[str, Tensor] = {}
    for path, layer in task_layers(model, task).items():
        slot = layer.slots()[task]
        prefix = path.removesuffix(".in_proj_weight").removesuffix(".bias")
        if isinstance(slot, (Slot, BiasSlot)) and slot.bias is not None:
            found[f"{prefix}.bias"] = slot.bias.weight
        if isinstance(slot, Slot):
            name = path if path.endswith("in_proj_weight") else f"{path}.weight"
            W = layer.weight.detach()
            A, B = layer.update(slot)
            V = (W.flatten(1) + slot.coefficient * B @ A).view(W.shape)
            if slot.magnitude is not None:
                V = (
                    slot.magnitude.weight.view(-1, *[1] * (W.dim() - 1))
                    * V
                    / V.detach().flatten(1).norm(dim=1).view(-1, *[1] * (W.dim() - 1))
                )
            found[name] = V
    return found


def dense(model: Net, task: str) -> Tensor:
    return functional_call(net(next(model.parameters()).dtype), changed(model, task), (batch(torch.float64),))


def cells() -> list[tuple[str, str]]:
    return [
        (targets, variant)
        for targets in TARGETS
        for variant in VARIANTS
        if not (targets == "none" and variant != "lora")
        and not (
            targets == "linear and attention" and variant == "dora"
        )  # the oracle below knows two sorts of W
    ]


@pytest.mark.parametrize(("targets", "variant"), cells())
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_outputs_and_gradients_are_those_of_the_bias_in_place(
    targets: str, variant: str, bias: str, fill: Fill
) -> None:
    if bias == "lora_only" and targets == "none":
        return
    model = adapt(targets, dtype=torch.float64, bias=bias, **VARIANTS[variant])
    fill(model)
    have = {name for name in changed(model, "default") if name.endswith("bias")}
    adapted = {"first.bias", "attention.out_proj.bias", "conv.bias"} & {
        f"{name}.bias" for target in TARGETS[targets] for name in (target, f"{target}.out_proj")
    }
    assert have == (BIASES if bias == "all" else adapted)
    for mode in (True, False):
        y, true = model.train(mode)(batch(torch.float64)), dense(model, "default")
        torch.testing.assert_close(y, true, rtol=1e-9, atol=1e-9)
    pull = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(9))
    leaves = list(adapter_parameters(model).values())
    mine, theirs = (torch.autograd.grad((out * pull).sum(), leaves) for out in (y, true))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("targets", "variant"), cells())
def test_a_fresh_task_is_the_base_to_the_bit(targets: str, variant: str, dtype: torch.dtype) -> None:
    model = adapt(targets, dtype=dtype, **VARIANTS[variant])
    assert_base(model, dtype=dtype)


def test_dropout_with_a_bias_is_reached_by_both_products(fill: Fill) -> None:
    for dora in (False, True):
        layer = nn.Linear(4, 3)
        inject(layer, AdapterConfig(r=2, dropout=0.5, dora=dora, bias="lora_only"))
        before = copy.deepcopy(layer)
        with torch.no_grad():
            layer.lora_bias.get("default").weight.add_(torch.tensor([1.0, -2.0, 3.0]))
        x, y = torch.randn(5, 4), []
        for one in (layer.train(), before.train()):
            torch.manual_seed(0)
            y.append(one(x))
        torch.testing.assert_close(y[0] - y[1], torch.tensor([1.0, -2.0, 3.0]).expand(5, 3))


def test_rows_and_sums(fill: Fill) -> None:
    """Rows follow their task's biases, a sum adds w·(b_t − b), short rows and long ones alike."""
    for targets, settings in [
        ("linear", {}),
        ("linear and attention", {}),
        ("conv", {}),
        ("linear", {"dora": True}),
    ]:
        model = adapt(targets, "a", **settings)
        inject(model, config(targets, bias="lora_only"), "b")
        inject(model, config(targets, bias="none"), "c")
        for seed, name in enumerate("abc"):
            fill(model, name, seed)
        for x in (batch(), batch()[:, :1]):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    y = model(x, task=["b", None, "a", "c"])
                    for row, task in enumerate(["b", None, "a", "c"]):
                        torch.testing.assert_close(
                            y[row], model(x[row : row + 1], task=task)[0], rtol=1e-4, atol=1e-5
                        )
    layer = nn.Linear(4, 3, dtype=torch.float64)
    for name, bias in (("a", "all"), ("b", "lora_only"), ("c", "none")):
        inject(layer, AdapterConfig(r=2, bias=bias), name)
        fill(layer, name, len(name))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    base, weights = layer(x, task=None), {"a": 0.5, "b": -2.0, "c": 3.0}
    true = base + sum(w * (layer(x, task=task) - base) for task, w in weights.items())
    torch.testing.assert_close(layer(x, tasks=weights), true)


def test_a_task_trains_its_own_biases_and_nothing_else_moves() -> None:
    model = adapt("linear", "a")
    inject(model, config("linear and attention"), "b")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, b_ratio=2), weight_decay=0.1)
    lr = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert lr[id(model.norm.lora_parameters.get("bias").lora_bias.get("a").weight)] == 0.1
    for _ in range(2):
        model.train()(batch()).square().sum().backward()
        check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(adapter_parameters(model, "b"))
    assert sum(".lora_bias." in name for name in moved) == len(BIASES)
    assert base_state_dict(model).keys() == net().state_dict().keys()


def test_merging_is_exact_both_ways(fill: Fill) -> None:
    for targets, settings in [("linear and attention", {}), ("conv", {"dora": True}), ("without a bias", {})]:
        model = adapt(targets, **settings)
        fill(model)
        before, y = copy.deepcopy(model.state_dict()), model(batch())
        merge(model)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()), y, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        unmerge(model)
        assert torch.equal(model(batch()), y)
        plain = net()
        plain.load_state_dict(merged_state_dict(model))
        torch.testing.assert_close(plain(batch()), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(batch()), y)
        assert not [name for name, _ in model.named_buffers() if "backup" in name]


def test_copies_names_and_removal(fill: Fill) -> None:
    model = adapt("linear and attention", "a.b")
    fill(model)
    y = model(batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(batch()), y)
        with torch.no_grad():
            twin.norm.lora_parameters.get("bias").lora_bias.get("a.b").weight.add_(1)
        assert torch.equal(model(batch()), y)
    rename(model, "a.b", "train")
    assert torch.equal(model(batch(), task="train"), y)
    fresh = adapt("linear and attention", "train")
    state = model.state_dict()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(batch()), y)
    del state["first.lora_bias.%74rain.weight"]
    with pytest.raises(RuntimeError, match="first.lora_bias"):
        fresh.load_state_dict(state)
    remove(model, "train")
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}
    assert_base(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_serves_all_tasks(fill: Fill) -> None:
    """Norms, attention and convolution too, whose biases are put in place on a shell."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, names = net(), ["a", "b", "c"]
    for seed, name in enumerate(names):
        inject(model, config("linear and attention"), name)
        fill(model, name, seed, 0.1)
    ways: list[list[dict[str, Any]]] = [
        [{"task": name} for name in names],
        [{"task": ["a", "b", None, "a"]}, {"task": ["b", None, "c", "b"]}, {"task": ["c", "a", "a", None]}],
        [{"tasks": {"a": 1.0, "b": 0.5}}, {"tasks": {"c": -1.0, "b": 2.0}}],
    ]
    for way in ways:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for options in way:
            model.zero_grad()
            true = model(batch(), **options)
            true.square().sum().backward()
            grads = {name: p.grad for name, p in adapter_parameters(model).items()}
            model.zero_grad()
            with route(model, **options):
                y = compiled(batch())
                torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-5)
                y.square().sum().backward()
            for name, p in adapter_parameters(model).items():
                mine = torch.zeros_like(p) if p.grad is None else p.grad
                theirs = torch.zeros_like(p) if grads[name] is None else grads[name]
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        assert counter.frame_count == 1
    torch._dynamo.reset()


def test_checkpointed_it_has_the_gradients_of_the_route_of_its_forward(fill: Fill) -> None:
    from torch.utils.checkpoint import checkpoint

    model = adapt("linear", "a")
    inject(model, config("linear"), "b")
    for seed, name in enumerate("ab"):
        fill(model, name, seed)
    model.train()
    model(batch(), task="a").sum().backward()
    true = {name: p.grad.clone() for name, p in adapter_parameters(model, "a").items()}
    model.zero_grad()
    with route(model, "a"):
        loss = checkpoint(model, batch(), use_reentrant=False).sum()
    loss.backward()
    for name, p in adapter_parameters(model, "a").items():
        torch.testing.assert_close(p.grad, true[name])
    assert all(p.grad is None for p in adapter_parameters(model, "b").values())


def test_modules_trained_whole_keep_their_bias_to_themselves() -> None:
    model = adapt("linear", save_modules=("head",))
    assert "lora_bias" not in model.head._modules
    assert len([name for name in adapter_parameters(model) if "lora_bias" in name]) == len(BIASES) - 1


class Tied(nn.Module):
    """A head whose bias is also its parent's, as BERT's is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.decoder = nn.Linear(4, 4), nn.Linear(4, 3)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.body(x))


def test_a_shared_bias_is_shared(tmp_path: Path) -> None:
    model = Tied()
    inject(model, AdapterConfig(r=2, targets=("body",), bias="all"))
    bias = {name: p for name, p in model.named_parameters() if "lora_bias" in name}
    assert len(bias) == 2
    model(torch.randn(2, 4)).sum().backward()
    check_gradients(model)
    with torch.no_grad():
        model.decoder.lora_bias.get("default").weight.add_(1)
    other = copy.deepcopy(model)
    load(other, save(model, tmp_path), "again")
    x = torch.randn(2, 4)
    torch.testing.assert_close(other(x, task="again"), model(x))


def test_a_setting_that_does_nothing_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    report = inject(model, AdapterConfig(r=2, bias="lora_only"))
    assert "bias='lora_only' (no module in reach has one)" in str(report)
    with pytest.raises(ConfigError, match="bias must be one of 'none', 'lora_only', 'all', got 'each'"):
        AdapterConfig(bias="each")


def test_what_knows_only_factors_refuses_or_passes_by(fill: Fill) -> None:
    model = adapt("linear", bias="lora_only")
    with pytest.raises(TaskError, match="has a bias of its own at layer 'first'"):
        combine(model, {"default": 1.0}, "new")
    model = adapt("linear")
    with pytest.raises(TaskError, match="has a bias of its own at layer"):
        combine(model, {"default": 1.0}, "new")
    assert init_eva(model, [batch()]).keys() == {"first"}


# -- PEFT ----------------------------------------------------------------------------------------------------


def theirs(targets: str, bias: str, **fields: Any) -> Any:
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(TARGETS[targets]), bias=bias, **fields)
    model = peft.get_peft_model(net(), settings).eval()
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model


# PEFT adds twice the update of an attention's out_proj (docs/formats.md), so its outputs are no oracle there.
PEFTS = [
    (targets, bias, fields)
    for targets in ("linear", "conv", "without a bias")
    for bias in ("all", "lora_only")
    for fields in ({}, {"use_dora": True})
]


@pytest.mark.parametrize(("targets", "bias", "fields"), PEFTS)
def test_files_of_peft(targets: str, bias: str, fields: dict[str, Any], tmp_path: Path) -> None:
    oracle = theirs(targets, bias, **fields)
    oracle.save_pretrained(tmp_path / "theirs")
    model = net()
    load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(batch()), oracle(batch()), rtol=0, atol=1e-5)
    assert_base(model, task=None)
    save(model, tmp_path / "ours")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours").eval()
    torch.testing.assert_close(again(batch()), oracle(batch()), rtol=0, atol=1e-5)


def test_pefts_keys_of_an_attention(tmp_path: Path) -> None:
    theirs("linear and attention", "all").save_pretrained(tmp_path / "theirs")
    model = net()
    load(model, tmp_path / "theirs")
    files = [
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "theirs", save(model, tmp_path / "o"))
    ]
    assert files[0].keys() == files[1].keys()
    assert "base_model.model.attention.base_layer.out_proj.base_layer.bias" in files[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("base_model.model.norm.bias"), "model.norm.bias is missing"),
        (
            lambda t: t.update({"base_model.model.plain.bias": torch.ones(8)}),
            "model.plain.bias is unexpected",
        ),
        (
            lambda t: t.update({"base_model.model.first.bias": torch.ones(8)}),
            "model.first.bias is unexpected",
        ),
        (lambda t: t.update({"base_model.model.norm.bias": torch.ones(7)}), r"norm.bias has shape \(7,\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: Callable[..., Any], said: str, tmp_path: Path) -> None:
    save(adapt(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = net()
    with pytest.raises(AdapterFileError, match=said):
        load(model, tmp_path)
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}
    assert all(p.requires_grad for p in model.parameters())


def test_peft_writes_a_whole_modules_bias_thrice(tmp_path: Path) -> None:
    oracle = theirs("linear", "all", modules_to_save=["head"])
    oracle.save_pretrained(tmp_path)
    model = net()
    load(model, tmp_path)
    torch.testing.assert_close(model(batch()), oracle(batch()), rtol=0, atol=1e-5)

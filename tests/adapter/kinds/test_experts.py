"""Parameters adapted by themselves, against W + ΔW written out and against PEFT's target_parameters."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    GradientError,
    TargetError,
    adapter_parameters,
    check_gradients,
    inject,
    merge,
    remove,
    route,
    task_layers,
    unmerge,
)

BOTH = ("experts.gate_up_proj", "experts.down_proj")


class Experts(nn.Module):
    """A stack of experts as transformers 5 keeps them; tokens come flattened."""

    def __init__(self, n: int = 3, hidden: int = 6, inner: int = 4, transposed: bool = False) -> None:
        super().__init__()
        up, down = (n, 2 * inner, hidden), (n, hidden, inner)
        if transposed:
            self.is_transposed = True
            up, down = (n, hidden, 2 * inner), (n, inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.5)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.5)
        self.calls = 0

    def forward(self, x_TH: Tensor, index_T: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        y = torch.zeros_like(x_TH)
        for expert, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            if getattr(self, "is_transposed", False):
                up, down = up.T, down.T
            gate, value = F.linear(x_TH, up).chunk(2, -1)
            out = F.linear(F.silu(gate) * value, down)
            y = torch.where((index_T == expert)[:, None], out, y)
        return y


class Mixture(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.experts = Experts(**options)
        self.head = nn.Linear(6, 3)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        index_T = (x_TH.sum(-1) * 7).floor().long() % 3
        return self.head(self.experts(x_TH, index_T).view(x_BSH.shape))


def make(dtype: torch.dtype = torch.float64, **options: Any) -> Mixture:
    torch.manual_seed(3)
    return Mixture(**options).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(4)).to(dtype)


def config(**options: Any) -> AdapterConfig:
    return AdapterConfig(**{"r": 2, "alpha": 3, "targets": (), "parameters": BOTH, **options})


def dense(model: nn.Module, task: str, weight: float = 1.0) -> dict[str, Tensor]:
    """W + w·ΔW expert by expert, from PEFT's layout: A (r·n, in) expert by expert, B (out, r·n) rank by rank."""
    found = {}
    for path, layer in task_layers(model, task).items():
        slot = layer.low_rank_slot(task)
        W = model.get_parameter(path)
        n, r = len(W), slot.up.r
        A = slot.down.weight.reshape(n, r, -1)
        B = slot.up.weight.reshape(-1, r, n)
        BA = torch.einsum("ore,eri->eoi", B, A)
        if slot.start is not None:
            A0, B0 = (owner.weight for owner in slot.start[:2])
            BA = BA - torch.einsum("ore,eri->eoi", B0.reshape(-1, r, n), A0.reshape(n, r, -1))
        delta = slot.coefficient * BA
        found[path] = W + weight * (delta.mT if getattr(model.experts, "is_transposed", False) else delta)
    return found


def oracle(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    with route(model, None):
        return functional_call(model, weights, (x,))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {"rslora": True}, {"gated": True}, {"init": "pissa"}, {"init": "olora"}]
)
def test_output_and_gradients_equal_the_dense_module(
    transposed: bool, variant: dict[str, Any], fill: Callable[..., None]
) -> None:
    model, x = make(transposed=transposed), batch()
    before = model(x)
    report = inject(model, config(**variant), "a")
    assert report.layers == BOTH
    assert torch.equal(model(x), before), "a fresh adapter changes nothing"
    fill(model)
    parameters = list(adapter_parameters(model).values())
    wanted = oracle(model, dense(model, "a"), x)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    got = model(x)
    gradients = torch.autograd.grad(got.square().sum(), parameters)
    assert not torch.allclose(got, before)
    for mine, theirs in zip((got, *gradients), (wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    for path, layer in task_layers(model, "a").items():
        A, B = layer.factors(slot := layer.low_rank_slot("a"))
        W = layer.matrix() + layer.delta(slot)
        torch.testing.assert_close(W.mT if transposed else W, dense(model, "a")[path])
        layer.set_factors(slot, A.clone(), B.clone())
        assert layer.matrix_shape() == W.shape[-2:]
    assert torch.equal(model(x), got)


def test_one_task_per_row_and_tasks_together(fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    inject(model, config(), "a")
    inject(model, config(r=1, parameters=BOTH[:1]), "b")
    fill(model)
    rows = model(x, task=["b", None, "a"])
    for row, task in enumerate(["b", None, "a"]):
        torch.testing.assert_close(rows[row], model(x, task=task)[row], rtol=1e-10, atol=1e-10)
    first, second = dense(model, "a", 0.5), dense(model, "b", -2.0)
    both = {**first, BOTH[0]: first[BOTH[0]] + second[BOTH[0]] - model.get_parameter(BOTH[0])}
    together = model(x, tasks={"a": 0.5, "b": -2.0})
    torch.testing.assert_close(together, oracle(model, both, x), rtol=1e-10, atol=1e-10)
    model.zero_grad()
    rows.square().sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_what_the_module_sets_on_itself_is_kept() -> None:
    model = make()
    inject(model, config(), "a")
    model(batch())
    assert model.experts.calls == 1
    assert isinstance(model.experts.gate_up_proj, nn.Parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_exact_both_ways(dtype: torch.dtype, fill: Callable[..., None]) -> None:
    model, x = make(dtype), batch(dtype)
    before = model(x)
    inject(model, config(), "a")
    assert torch.equal(model(x), before)
    fill(model)
    model.eval()
    state, routed = copy.deepcopy(model.state_dict()), model(x)
    for _ in range(3):
        merge(model)
        assert torch.equal(model(x), routed), "rounded once, in the same way"
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        with pytest.raises(RuntimeError, match=r"experts\.(gate_up|down)_proj: task 'a' is merged"):
            model.load_state_dict(state)
        unmerge(model)
    model.load_state_dict(state)
    remove(model, "a")
    assert type(model.experts) is Experts
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(copied: Callable[[Any], Any], fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    inject(model, config(), "a")
    fill(model)
    before = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), before)
    merge(twin)
    with torch.no_grad():
        twin.eval()
        torch.testing.assert_close(twin(x), before.detach())
    assert torch.equal(model(x), before)
    state = model.state_dict()
    other = make()
    inject(other, config(), "a")
    other.load_state_dict(state)
    assert torch.equal(other(x), before)
    other.load_state_dict(make().state_dict())


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(5)
    settings = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(settings).eval()


def test_mixtral_equals_peft(tokens: Tensor, fill: Callable[..., None]) -> None:
    from peft import LoraConfig, get_peft_model

    tokens = tokens % 32
    mine, theirs = mixtral(), mixtral()
    before = mine(tokens).logits
    inject(mine, config(r=3), "a")
    assert torch.equal(mine(tokens).logits, before)
    fill(mine, size=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(
            theirs, LoraConfig(r=3, lora_alpha=3, target_modules=[], target_parameters=list(BOTH))
        )
    wrappers = {
        f"{name.split('base_model.model.')[1].replace('.base_layer', '')}.{wrapper.parameter_name}": wrapper
        for name, wrapper in theirs.named_modules()
        if hasattr(wrapper, "parameter_name")
    }
    layers = task_layers(mine, "a")
    assert wrappers.keys() == layers.keys()
    with torch.no_grad():
        for path, layer in layers.items():
            slot = layer.low_rank_slot("a")
            wrappers[path].lora_A["default"].weight.copy_(slot.down.weight)  # the same layout
            wrappers[path].lora_B["default"].weight.copy_(slot.up.weight)
    got = mine(tokens).logits
    assert not torch.allclose(got, before)
    torch.testing.assert_close(got, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    theirs(tokens).logits.square().sum().backward()
    for path, layer in layers.items():
        slot = layer.low_rank_slot("a")
        torch.testing.assert_close(
            slot.down.weight.grad, wrappers[path].lora_A["default"].weight.grad, rtol=1e-4, atol=1e-5
        )
    rows = mine(tokens, task=["a", None, "a"]).logits
    torch.testing.assert_close(rows[1], before[1])
    torch.testing.assert_close(rows[2], got[2])


def test_experts_without_tokens_are_a_warning() -> None:
    """Where experts are modules of their own, one that no token reached has no gradient."""

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](self.first(x))

    model = Old()
    inject(model, AdapterConfig(r=2, targets=("first", "experts")), "a")
    model(torch.randn(2, 4)).sum().backward()
    with pytest.warns(
        UserWarning, match=r"2 adapter parameter\(s\) of experts received no gradient.*experts.1"
    ):
        check_gradients(model)
    inject(model, AdapterConfig(r=2, targets=("first",)), "b")
    model.zero_grad()
    model.experts[0](torch.randn(2, 4)).sum()
    with pytest.raises(GradientError, match="first"):
        model(torch.randn(2, 4)).detach()
        check_gradients(model)


def test_what_cannot_be_adapted_is_refused_and_named() -> None:
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    for error, options, message in [
        (TargetError, {"parameters": ("experts.gate_up",)}, "did you mean 'experts.gate_up_proj'"),
        (TargetError, {"parameters": ("head.weight",)}, r"name the layer instead: targets=\('head',\)"),
        (ConfigError, {"dora": True}, "DoRA is not defined for the stacked weights"),
        (ConfigError, {"dropout": 0.1}, "dropout=0.1"),
        (ConfigError, {"r": 5}, r"'experts.down_proj' has a weight of 4 -> 6 .*r is 5"),
        (ConfigError, {"parameters": ()}, "targets is empty"),
    ]:
        with pytest.raises(error, match=message):
            inject(model, config(**options), "a")
        assert {name: type(module) for name, module in model.named_modules()} == before
    model.experts.bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(TargetError, match=r"'experts.bias' is a torch.float32 of the shape \(4,\)"):
        inject(model, config(parameters=("experts.bias",)), "a")


def test_linear_layers_and_parameters_in_one_task(fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    report = inject(model, config(targets=("head",)), "a")
    assert report.layers == (*BOTH, "head")
    model.zero_grad()
    model(x).sum().backward()
    check_gradients(model)
    ranks = config(rank_pattern={"experts.down_proj": 1}, targets=("head",))
    inject(model, ranks, "b")
    assert [layer.low_rank_slot("b").up.r for layer in task_layers(model, "b").values()] == [2, 1, 2]

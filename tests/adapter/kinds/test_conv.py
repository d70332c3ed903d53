"""Adapted convolutions against the dense oracle, and against PEFT where PEFT is right."""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    MergeError,
    RouteError,
    TargetError,
    inject,
    merge,
    register_forward,
    remove,
    route,
    unmerge,
)
from orbit.adapter.routes.plan import Scaled
from tests.adapter.oracle import VARIANTS, bare_copy, same_as_dense, trained

SIZES = {1: (9,), 2: (9, 8), 3: (5, 6, 5)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride and padding": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect", "stride": 2},
    "replicate, same": {"padding": "same", "padding_mode": "replicate"},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "all at once": {"groups": 2, "dilation": 2, "padding": 2, "padding_mode": "circular", "stride": 2},
}


def make(dims: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return CONVS[dims](4, 8, 3 if dims < 3 else 2, **options, dtype=dtype)


def batch(dims: int, n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, *SIZES[dims], generator=torch.Generator().manual_seed(1)).to(dtype)


def delta(A: Tensor, B: Tensor) -> Tensor:
    """Σ_r B[o, r]·A[r, …], written with einsum and no matrix view."""
    return torch.einsum("or,r...->o...", B.reshape(B.shape[:2]), A)


CASES = [(dims, options, variant) for dims in (1, 2) for options in LAYERS for variant in VARIANTS]
CASES += [(3, options, "gated dora") for options in LAYERS if "reflect" not in options]


@pytest.mark.parametrize(("dims", "options", "variant"), CASES)
def test_is_the_layer_with_the_dense_weight(dims: int, options: str, variant: str) -> None:
    layer = make(dims, **LAYERS[options])
    bare = bare_copy(layer)
    trained(layer, **VARIANTS[variant])
    assert layer.slots()["default"].down.weight.shape == (2, *layer.weight.shape[1:])
    same_as_dense(layer, bare, batch(dims), delta)
    if "padding_mode" not in LAYERS[options] or dims < 3:
        same_as_dense(layer, bare, batch(dims)[0], delta)  # without a batch axis


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dims", CONVS)
def test_is_pefts(dims: int, dropout: float, kind: str) -> None:
    mine = trained(make(dims, stride=2, padding=1), dropout=dropout, **VARIANTS[kind])
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        lora_dropout=dropout,
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        target_modules=["c"],
    )
    model = peft.get_peft_model(nn.ModuleDict({"c": make(dims, stride=2, padding=1)}), config)
    theirs = model.base_model.model["c"]
    slot = mine.slots()["default"]
    pairs = [
        (slot.down.weight, theirs.lora_A["default"].weight),
        (slot.up.weight, theirs.lora_B["default"].weight),
    ]
    if slot.magnitude is not None:
        pairs.append((slot.magnitude.weight, theirs.lora_magnitude_vector["default"].weight))
    results = []
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own.reshape(other.shape))
    for layer, index in ((mine, 0), (theirs, 1)):
        torch.manual_seed(5)
        y = layer.train()(batch(dims))
        results.append((y, torch.autograd.grad(y.square().sum(), [pair[index] for pair in pairs])))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-9, atol=1e-11)
    for own, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(own, other.reshape(own.shape), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", ["plain", "groups"])
def test_a_fresh_adapter_returns_the_very_bits(options: str, dtype: torch.dtype, variant: str) -> None:
    layer, x = make(2, dtype, **LAYERS[options]), batch(2, dtype=dtype)
    before = layer(x)
    inject(layer, AdapterConfig(r=2, dropout=0.3, **VARIANTS[variant]))
    assert torch.equal(layer.train()(x), before)
    assert torch.equal(layer.eval()(x), before)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {owner.weight.dtype for owner in layer.slots()["default"] if owner is not None} == {wide}
    remove(layer, "default")
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("options", ["plain", "groups"])
def test_half_precision_and_autocast_are_near_the_dense_layer(options: str) -> None:
    exact = trained(make(2, **LAYERS[options]), dora=True)
    want = exact(batch(2))
    half = trained(make(2, torch.bfloat16, **LAYERS[options]), dora=True)
    half.load_state_dict(exact.state_dict())
    got = half(batch(2, dtype=torch.bfloat16))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.1, atol=0.1)
    single = trained(make(2, torch.float32, **LAYERS[options]), dora=True)
    single.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = single(batch(2, dtype=torch.float32))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert single.slots()["default"].down.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", ["all at once", "same"])
def test_merge_is_the_routed_layer_and_unmerge_the_very_bits(options: str, variant: str) -> None:
    layer = trained(make(2, **LAYERS[options]), **VARIANTS[variant]).eval()
    x, weight = batch(2), layer.weight.clone()
    routed = layer(x)
    merge(layer)
    assert layer.weight.shape == weight.shape
    torch.testing.assert_close(layer(x), routed, rtol=1e-9, atol=1e-11)
    unmerge(layer)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), routed)


@pytest.mark.parametrize("variant", ["lora", "gated dora"])
def test_rows_and_sums_are_the_tasks_own(variant: str) -> None:
    layer, x = trained(make(1, padding=1), "a", **VARIANTS[variant]), batch(1, 4)
    trained(layer, "b", seed=1, r=3, **VARIANTS[variant])
    one = {}
    for task in ("a", "b", None):
        with route(layer, task):
            one[task] = layer(x)
    with route(layer, ["b", None, "a", "b"]):
        rows = layer(x)
        with pytest.raises(RouteError, match="without a batch axis"):
            layer(x[0])
    torch.testing.assert_close(rows, torch.stack([one["b"][0], one[None][1], one["a"][2], one["b"][3]]))
    with route(layer, tasks={"a": 0.5, "b": -2.0}):
        together, alone = layer(x), layer(x[0])
    want = one[None] + 0.5 * (one["a"] - one[None]) - 2 * (one["b"] - one[None])
    torch.testing.assert_close(together, want)
    torch.testing.assert_close(alone, want[0])


@pytest.mark.parametrize("variant", ["gated", "dora"])
def test_gradients_of_mixed_rows_are_those_of_separate_batches(variant: str) -> None:
    layer, x = trained(make(2, groups=2), "a", **VARIANTS[variant]), batch(2, 4)
    trained(layer, "b", seed=1, **VARIANTS[variant])
    dy = torch.randn(4, 8, 7, 6).double()
    (layer(x, task=["a", "b", None, "a"]) * dy).sum().backward()
    for task, rows in (("a", [0, 3]), ("b", [1])):
        own = [owner.weight for owner in layer.owners(task).values()]
        wanted = torch.autograd.grad((layer(x[rows], task=task) * dy[rows]).sum(), own)
        torch.testing.assert_close([weight.grad for weight in own], list(wanted))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", ["all at once", "depthwise"])
def test_one_graph_under_compile(options: str) -> None:
    layer = trained(make(2, torch.float32, **LAYERS[options]), dora=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, A = batch(2, dtype=torch.float32), layer.slots()["default"].down.weight
    torch.testing.assert_close(compiled(x), layer(x))
    mine, eager = (torch.autograd.grad(f(x).square().sum(), A) for f in (compiled, layer))
    torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


def test_scalings_of_rows_fit_and_those_of_positions_are_refused() -> None:
    layer, x = trained(make(2)), batch(2, 8)  # 8 rows, 8 channels: nothing fits by chance
    off, on = layer(x, task=None), layer(x)
    scalings = torch.randn(8, 1, 1, 1, dtype=torch.float64)
    with route(layer, Scaled(("default",), scalings, {id(layer): 0})):
        torch.testing.assert_close(layer(x), off + scalings * (on - off))
    with (
        route(layer, Scaled(("default",), torch.ones(8, 8, 1, 1), {id(layer): 0})),
        pytest.raises(RouteError, match="8 positions"),
    ):
        layer(x)


def test_the_sum_of_tasks_computes_the_layers_own_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trained(trained(make(1), "a"), "b")
    calls = []
    forward = nn.Conv1d.forward
    monkeypatch.setattr(nn.Conv1d, "forward", lambda self, x: calls.append(1) or forward(self, x))
    with route(layer, tasks=["a", "b"]):
        layer(batch(1))
    assert len(calls) == 1


def test_the_cached_norm_follows_the_weight() -> None:
    layer = trained(make(2, groups=2), dora=True)
    slot = layer.slots()["default"]

    def norm() -> Tensor:
        V = layer.weight + slot.up.scale * delta(slot.down.weight, slot.up.weight)
        value = layer.row_norm(slot)
        torch.testing.assert_close(value, V.flatten(1).norm(dim=1))
        return value

    first = norm()
    assert "_orbit_w2" in vars(layer)
    with torch.no_grad():
        layer.weight.mul_(3)
    assert not torch.allclose(norm(), first)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert not torch.allclose(twin.row_norm(twin.slots()["default"]), norm())


def test_subclasses_by_what_they_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orbit.adapter.kinds.registry._IN_FRONT", set())

    class Causal(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (2, 0)))

    class Standardised(nn.Conv1d):
        def _conv_forward(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, W - W.mean((1, 2), keepdim=True), bias)

    torch.manual_seed(7)
    layer = Causal(4, 8, 3, dtype=torch.float64)
    bare = bare_copy(layer)
    same_as_dense(trained(layer), bare, batch(1), delta)
    with pytest.raises(TargetError, match=r"Standardised\._conv_forward"):
        inject(Standardised(4, 8, 3), AdapterConfig(r=2))
    register_forward(Standardised)
    layer = Standardised(4, 8, 3, dtype=torch.float64)
    bare = bare_copy(layer)
    same_as_dense(trained(layer), bare, batch(1), delta)


def test_a_rank_above_the_matrix_is_refused_at_once() -> None:
    layer = make(2, groups=4)
    assert layer.weight.shape == (8, 1, 3, 3)
    for rank in (9, 10**8):
        with pytest.raises(ConfigError, match=rf"9 -> 8 .*rank above 8, and r is {rank}; lower it$"):
            inject(layer, AdapterConfig(r=rank))
    assert type(layer) is nn.Conv2d
    inject(layer, AdapterConfig(r=8))
    model = nn.ModuleDict({"x": nn.Conv1d(4, 4, 1), "y": nn.Linear(4, 3)})
    with pytest.raises(ConfigError, match=r"layer 'y' .*rank_pattern=\{'y': 3\}"):
        inject(model, AdapterConfig(r=4, targets=("x", "y")))
    assert type(model["x"]) is nn.Conv1d
    inject(model, AdapterConfig(r=4, targets=("x", "y"), rank_pattern={"y": 3}))


def test_merging_a_parametrized_convolution_is_refused_and_running_it_is_not() -> None:
    torch.manual_seed(7)
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3, dtype=torch.float64))
    plain = nn.Conv1d(4, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    bare = bare_copy(plain)
    for each in (layer, plain):
        torch.manual_seed(3)
        trained(each, dora=True)
    same_as_dense(plain, bare, batch(1), delta)
    torch.testing.assert_close(layer(batch(1)), plain(batch(1)))
    with pytest.raises(MergeError):
        merge(layer)


def test_fresh_factors_are_as_pefts() -> None:
    layer = nn.Conv2d(16, 64, 3)
    inject(layer, AdapterConfig(r=8))
    slot = layer.slots()["default"]
    bound = 1 / math.sqrt(16 * 9)
    assert 0.9 * bound < slot.down.weight.abs().max() <= bound
    assert slot.up.weight.shape == (64, 8, 1, 1)
    assert not slot.up.weight.any()

"""New tasks from others, against dense matrices and PEFT's `add_weighted_adapter` on the same files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    AdapterError,
    ConfigError,
    MergeError,
    RouteError,
    TaskError,
    adapter_parameters,
    combine,
    current_route,
    inject,
    load,
    merge,
    merged,
    merged_state_dict,
    route,
    save,
    set_route,
    task_layers,
    tasks,
    unmerge,
)
from tests.laws.peft_oracle import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DENSE_KINDS = [kind for kind in KINDS if "xperts" not in kind and "Multihead" not in kind]
Fill = Callable[..., None]
WEIGHTS = {"a": 1.0, "b": -0.5, "c": 2.0}


def bare() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10, bias=False), nn.Linear(10, 3))


@pytest.fixture
def three(fill: Fill) -> nn.Module:
    """Tasks a, b, c of several ranks, scales and layers; c is gated."""
    model = bare()
    inject(model, AdapterConfig(r=2, alpha=6, targets=("0", "2")), "a")
    inject(model, AdapterConfig(r=3, rslora=True, alpha=2, targets=("0", "3"), rank_pattern={"3": 1}), "b")
    inject(model, AdapterConfig(r=2, alpha=3, targets=("2", "0"), gated=True), "c")
    for seed, task in enumerate("abc"):
        fill(model, task, seed)
    return model.eval()


def deltas(model: nn.Module, weights: dict[str, float]) -> dict[str, list[Tensor]]:
    """w·ΔW of every task that a layer carries, written out."""
    found: dict[str, list[Tensor]] = {}
    for task, weight in weights.items():
        for path, layer in task_layers(model, task).items():
            slot = layer.low_rank_slot(task)
            gate = 1.0 if slot.gate is None else slot.gate.weight
            product = slot.up.weight @ slot.down.weight
            found.setdefault(path, []).append((weight * gate * slot.up.scale * product).detach())
    return found


def result(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {path: layer.delta(layer.low_rank_slot(name)) for path, layer in task_layers(model, name).items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_cat_is_the_weighted_sum_exactly(three: nn.Module) -> None:
    x, before = torch.randn(5, 12), parameters(three)
    set_route(three, "b")
    report = combine(three, WEIGHTS, "sum")
    dense = deltas(three, WEIGHTS)
    got = result(three, "sum")
    assert set(got) == {"0", "2", "3"} == set(dense)
    for path, parts in dense.items():
        torch.testing.assert_close(got[path], sum(parts))
        assert report.layers[path].norm == pytest.approx(float(got[path].norm()), rel=1e-4)
    assert {path: layer.rank for path, layer in report.layers.items()} == {"0": 7, "2": 4, "3": 1}
    assert report.error == 0
    for path, layer in task_layers(three, "sum").items():
        assert layer.low_rank_slot("sum").up.r == report.layers[path].rank
        assert layer.low_rank_slot("sum").coefficient == 1
    state = {key: value.clone() for key, value in three.state_dict().items() if "lora" not in key}
    for path, parts in dense.items():
        state[f"{path}.weight"] += sum(parts)
    expected = bare()
    expected.load_state_dict(state)
    torch.testing.assert_close(three(x, task="sum"), expected(x), rtol=1e-4, atol=1e-5)
    assert current_route(three) == "b"
    after = parameters(three)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in adapter_parameters(three, "sum").values())


def test_one_layer_under_a_task_and_its_negative_is_nothing(three: nn.Module) -> None:
    combine(three, {"a": 1.0}, "copy")
    x = torch.randn(5, 12)
    torch.testing.assert_close(three(x, task="copy"), three(x, task="a"))
    combine(three, {"a": 1.0, "copy": -1.0}, "nothing", method="svd", r=1)
    torch.testing.assert_close(three(x, task="nothing"), three(x, task=None), rtol=1e-5, atol=1e-5)


def test_a_cat_of_more_ranks_than_the_layer_has_is_still_exact(three: nn.Module) -> None:
    report = combine(three, {**dict.fromkeys("abc", 1.0)}, "once")
    combine(three, {"once": 1.0, "a": 1.0, "b": 1.0, "c": 1.0}, "twice")
    assert task_layers(three, "twice")["0"].low_rank_slot("twice").up.r == 12  # of 14, the layer's inputs
    for path, delta in result(three, "twice").items():
        torch.testing.assert_close(delta, 2 * result(three, "once")[path], rtol=1e-4, atol=1e-5)
    assert report.layers["0"].rank == 7


@pytest.mark.parametrize("r", [None, 1, 3, 99])
def test_svd_is_the_nearest_of_its_rank_and_says_what_it_misses(three: nn.Module, r: int | None) -> None:
    report = combine(three, WEIGHTS, "sum", "svd", r=r)
    got, missed, total = result(three, "sum"), 0.0, 0.0
    for path, parts in deltas(three, WEIGHTS).items():
        dense = sum(parts)
        U, S, Vt = torch.linalg.svd(dense)
        rank = min({"0": 3, "2": 2, "3": 1}[path] if r is None else r, {"0": 7, "2": 4, "3": 1}[path])
        torch.testing.assert_close(got[path], U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-4, atol=1e-5)
        error = float((dense - got[path]).norm())
        assert report.layers[path].rank == rank
        assert report.layers[path].error == pytest.approx(error / float(dense.norm()), abs=1e-5)
        missed, total = missed + error**2, total + float(dense.norm()) ** 2
    assert report.error == pytest.approx((missed / total) ** 0.5, abs=1e-5)
    assert (report.error > 0.1) == (r in (None, 1, 3))


def dense_method(method: str, parts: list[Tensor], density: float, rng: torch.Generator) -> Tensor:
    """The definitions once more, entry by entry."""
    thinned = []
    for part in parts:
        if method.startswith("dare"):
            thinned.append(part * torch.bernoulli(torch.full(part.shape, density), generator=rng) / density)
        else:
            least = part.abs().flatten().sort(descending=True).values[int(density * part.numel()) - 1]
            thinned.append(torch.where(part.abs() >= least, part, 0.0))
    if not method.endswith("ties"):
        return sum(thinned)
    out = torch.zeros_like(parts[0])
    for index in range(out.numel()):
        values = [float(one.flatten()[index]) for one in thinned]
        chosen = [v for v in values if (v > 0 if sum(values) >= 0 else v < 0)]
        out.view(-1)[index] = sum(chosen) / len(chosen) if chosen else 0.0
    return out


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_the_sparse_methods_follow_their_definitions(three: nn.Module, method: str, density: float) -> None:
    seed = {"seed": 5} if method.startswith("dare") else {}
    exact = combine(three, WEIGHTS, "full", method, r=99, density=density, **seed)
    short = combine(three, WEIGHTS, "short", method, density=density, **seed)
    rng = torch.Generator().manual_seed(5)
    for path, parts in deltas(three, WEIGHTS).items():
        expected = dense_method(method, parts, density, rng)
        torch.testing.assert_close(result(three, "full")[path], expected, rtol=1e-4, atol=1e-5)
        error = float((result(three, "short")[path] - expected).norm() / expected.norm())
        assert short.layers[path].error == pytest.approx(error, abs=1e-5)
    assert exact.error < 1e-6
    assert short.layers["0"].rank == 3


def test_the_draws_depend_on_the_seed_alone(three: nn.Module) -> None:
    combine(three, WEIGHTS, "x", "dare", density=0.5)
    torch.manual_seed(1)
    combine(three, WEIGHTS, "y", "dare", density=0.5, seed=0)
    combine(three, WEIGHTS, "z", "dare", density=0.5, seed=1)
    assert torch.equal(result(three, "x")["0"], result(three, "y")["0"])
    assert not torch.equal(result(three, "x")["0"], result(three, "z")["0"])


# -- PEFT ----------------------------------------------------------------------------------------------------

PEERS = {
    "cat": ("cat", {}),
    "svd": ("svd", {}),
    "ties": ("ties_svd", {"density": 0.5}),
    "magnitude_prune": ("magnitude_prune_svd", {"density": 0.5}),
    "dare": ("dare_linear_svd", {"density": 0.5}),
    "dare_ties": ("dare_ties_svd", {"density": 0.5}),
}


EQUAL, NEGATIVE = {"a": 0.7, "b": 0.7}, {"a": 1.0, "b": -0.5}


@pytest.mark.parametrize(
    ("method", "weights"),
    [  # PEFT elects the signs before it weighs the tasks, which is the same where the weights are
        *((method, EQUAL) for method in PEERS),
        *((method, NEGATIVE) for method in PEERS if not method.endswith("ties")),
    ],
)
def test_peft_combines_the_same_files_to_the_same(
    method: str, weights: dict[str, float], fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bare()
    for task, config in {
        "a": AdapterConfig(r=2, alpha=6, targets=("0", "2")),
        "b": AdapterConfig(r=3, alpha=2, rslora=True, targets=("0", "2")),
    }.items():
        inject(model, config, task)
        fill(model, task, seed=len(task) + ord(task))
        save(model, tmp_path / task, task)
    theirs = peft.PeftModel.from_pretrained(bare(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    kind, options = PEERS[method]
    bernoulli, rng = torch.bernoulli, torch.Generator().manual_seed(0)
    monkeypatch.setattr(torch, "bernoulli", lambda p, generator=rng: bernoulli(p, generator=generator))
    theirs.base_model.add_weighted_adapter(
        list(weights), list(weights.values()), "mix", combination_type=kind, **options
    )
    report = combine(model, weights, "mix", method, **options)
    for path, delta in result(model, "mix").items():
        peer = theirs.base_model.model.get_submodule(path).get_delta_weight("mix")
        torch.testing.assert_close(delta, peer, rtol=1e-4, atol=2e-5)
    if method == "svd":
        assert report.error > 0.01
    save(model, tmp_path / "mix", "mix")
    again = peft.PeftModel.from_pretrained(bare(), tmp_path / "mix").eval()
    x = torch.randn(5, 12)
    torch.testing.assert_close(again(x), model.eval()(x, task="mix"), rtol=1e-4, atol=1e-5)


def test_files_of_several_ranks_name_each_layer_once(three: nn.Module, tmp_path: Path) -> None:
    combine(three, WEIGHTS, "sum")
    save(three, tmp_path / "sum", "sum")
    other, x = bare().eval(), torch.randn(5, 12)
    load(other, tmp_path / "sum", "sum")
    assert torch.equal(other(x, task="sum"), three(x, task="sum"))


def test_names_that_end_alike_are_told_apart(fill: Fill) -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "x": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    inject(model, AdapterConfig(r=1, targets=("re:q",)), "a")
    inject(model, AdapterConfig(r=2, targets=("re:x.q",)), "b")
    fill(model)
    report = combine(model, {"a": 1.0, "b": 1.0}, "sum")
    assert {path: layer.rank for path, layer in report.layers.items()} == {"q": 1, "x.q": 2}
    report = combine(model, {"b": 1.0, "a": 1.0}, "other way round")
    assert {path: layer.rank for path, layer in report.layers.items()} == {"x.q": 2, "q": 1}
    slots = {path: layer.slots()["other way round"] for path, layer in task_layers(model, "a").items()}
    assert slots["q"].up.r == 1
    combine(model, {"a": 1.0}, "first")
    assert set(task_layers(model, "first")) == {"q"}


# -- DoRA and starts -----------------------------------------------------------------------------------------


def test_dora_is_refused_by_cat_and_approximated_by_svd(fill: Fill) -> None:
    model = bare()
    inject(model, AdapterConfig(r=2, dora=True, targets=("0",)), "dora")
    inject(model, AdapterConfig(r=2, targets=("0", "2")), "lora")
    fill(model, size=0.1)
    with pytest.raises(MergeError, match=r"layer '0': task 'dora' is DoRA.*full rank.*method='svd'"):
        combine(model, {"dora": 1.0, "lora": 1.0}, "sum")
    combine(model, {"lora": 1.0}, "fine")
    full = combine(model, {"dora": 1.0, "lora": -2.0}, "full", "svd", r=99)
    low = combine(model, {"dora": 1.0, "lora": -2.0}, "low", "svd", r=4)
    layer = model[0]
    slot = layer.low_rank_slot("dora")
    V = layer.weight + layer.delta(slot)
    W = slot.magnitude.weight[:, None] * V / V.norm(dim=1, keepdim=True)
    Delta = (W - layer.weight - 2 * layer.delta(layer.low_rank_slot("lora"))).detach()
    torch.testing.assert_close(result(model, "full")["0"], Delta, rtol=1e-4, atol=1e-5)
    assert full.error < 1e-6
    error = float((result(model, "low")["0"] - Delta).norm() / Delta.norm())
    assert 0.01 < error == pytest.approx(low.layers["0"].error, rel=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_counts_as_extra_ranks(init: str, fill: Fill) -> None:
    model, x = bare().eval(), torch.randn(5, 12)
    inject(model, AdapterConfig(r=2, init=init, targets=("0", "2")), "a")
    fill(model, size=0.1)
    report = combine(model, {"a": 1.0}, "plain")
    assert {layer.rank for layer in report.layers.values()} == {4}
    torch.testing.assert_close(model(x, task="plain"), model(x, task="a"), rtol=1e-4, atol=1e-5)


def test_half_precision_is_combined_in_float32(fill: Fill) -> None:
    model = bare().bfloat16()
    for task in "ab":
        inject(model, AdapterConfig(r=2), task)
    fill(model)
    combine(model, {"a": 1.0, "b": -1.0}, "sum")
    assert model[0].low_rank_slot("sum").down.weight.dtype == torch.float32
    for path, parts in deltas(model, {"a": 1.0, "b": -1.0}).items():
        torch.testing.assert_close(result(model, "sum")[path], sum(parts))


def test_a_new_task_trains_if_asked(three: nn.Module) -> None:
    combine(three, WEIGHTS, "sum", "svd", trainable=True)
    three(torch.randn(5, 12), task="sum").sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(three, "sum").values())
    assert three[0].weight.requires_grad is False


BAD: list[tuple[dict[str, Any], type[AdapterError], str]] = [
    ({"weights": {}}, ConfigError, "not empty"),
    ({"weights": {"a": float("nan")}}, ConfigError, "weight of task 'a' must be a finite number, got nan"),
    ({"weights": {"a": True}}, ConfigError, "got True"),
    ({"weights": {"a": 1.0, "x": 1.0}}, TaskError, "no task 'x'"),
    ({"name": "b"}, TaskError, "there is a task 'b' already"),
    ({"name": ""}, TaskError, "non-empty"),
    ({"method": "linear"}, ConfigError, "method must be one of 'cat', .*got 'linear'"),
    ({"r": 2}, ConfigError, "no meaning for 'cat'"),
    ({"method": "svd", "r": 0}, ConfigError, "r must be a whole number >= 1, got 0"),
    ({"method": "ties"}, ConfigError, "'ties' needs density"),
    ({"method": "ties", "density": 0.0}, ConfigError, r"density must lie in \(0, 1\], got 0.0"),
    ({"method": "svd", "density": 0.5}, ConfigError, "density=0.5 has no meaning for 'svd'"),
    ({"method": "ties", "density": 0.5, "seed": 1}, ConfigError, "which draws nothing"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_refusals_change_nothing(
    three: nn.Module, options: dict[str, Any], error: type[AdapterError], message: str
) -> None:
    before = three.state_dict()
    with pytest.raises(error, match=message):
        combine(three, **{"weights": WEIGHTS, "name": "sum", **options})
    assert tasks(three) == ("a", "b", "c")
    assert list(three.state_dict()) == list(before)
    assert current_route(three) == "c"


def test_models_that_are_merged_running_or_broken_are_refused(three: nn.Module) -> None:
    merge(three, "a")
    with pytest.raises(MergeError, match="'a' is merged into the weights"):
        combine(three, WEIGHTS, "sum")
    unmerge(three)
    with route(three, "a"), pytest.raises(RouteError, match="while a call"):
        combine(three, WEIGHTS, "sum")
    with torch.no_grad():
        three[2].low_rank_slot("a").up.weight[0, 0] = torch.inf
    with pytest.raises(MergeError, match="layer '2': task 'a' holds values that are not finite"):
        combine(three, WEIGHTS, "sum", "svd")
    assert tasks(three) == ("a", "b", "c")


# -- the merged state dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=["lora", "dora", "pissa"])
def test_a_merged_state_dict_loads_into_a_bare_model(options: dict[str, Any], fill: Fill) -> None:
    model, x = bare().eval(), torch.randn(5, 12)
    inject(model, AdapterConfig(r=2, **options), "a")
    inject(model, AdapterConfig(r=2), "b")
    fill(model, size=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = merged_state_dict(model, "a")
    fresh = bare().eval()
    assert list(state) == list(fresh.state_dict())
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x), model(x, task="a"), rtol=1e-4, atol=1e-5)
    assert merged(model) is None
    assert current_route(model) == "b"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merge(model, "a")
    again = merged_state_dict(model)
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert merged(model) == "a"
    with pytest.raises(MergeError, match="'a' is merged already"):
        merged_state_dict(model, "b")


def test_save_pretrained_writes_a_merged_model(
    llama: Callable[..., nn.Module], fill: Fill, tokens: Tensor, tmp_path: Path
) -> None:
    model = llama()
    inject(model, AdapterConfig(r=2))
    fill(model, size=0.1)
    model.save_pretrained(tmp_path, state_dict=merged_state_dict(model))
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    tied = llama(tie_word_embeddings=True)
    inject(tied, AdapterConfig(r=2, targets=("lm_head",)))
    fill(tied)
    with pytest.raises(MergeError, match="shares its storage"):
        merged_state_dict(tied)
    state = merged_state_dict(tied, untie=True)
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_every_kind_is_combined_by_its_matrix(kind: str, method: str, fill: Fill) -> None:
    model, batch = KINDS[kind].make(), KINDS[kind].batch()
    for seed, task in enumerate("ab"):
        inject(model, AdapterConfig(r=2, targets=("layer",), init="kaiming" if seed else "pissa"), task)
        fill(model, task, seed)
    layer, options = model.layer, {"cat": {}, "svd": {"r": 6}, "ties": {"r": 6, "density": 0.5}}
    parts = [1.5 * layer.delta(layer.slots()["a"]), -layer.delta(layer.slots()["b"])]
    report = combine(model, {"a": 1.5, "b": -1.0}, "mix", method, **options[method])
    expected = dense_method("ties", parts, 0.5, torch.Generator()) if method == "ties" else sum(parts)
    torch.testing.assert_close(layer.delta(layer.slots()["mix"]), expected, rtol=1e-4, atol=1e-5)
    assert report.error < 1e-5
    plain = KINDS[kind].make()
    plain.layer.weight.data.copy_(layer.as_weight(layer.matrix() + expected))
    torch.testing.assert_close(model(*batch, task="mix"), plain(*batch), rtol=1e-4, atol=1e-5)
    plain.load_state_dict(merged_state_dict(model, "mix"))
    torch.testing.assert_close(model(*batch, task="mix"), plain(*batch), rtol=1e-4, atol=1e-5)


WHOLE: dict[str, dict[str, Any]] = {
    "MultiheadAttention": {"targets": ("layer",)},
    "Experts": {"targets": (), "parameters": ("layer.up", "layer.down")},
    "Experts stored (in, out)": {"targets": (), "parameters": ("layer.up", "layer.down")},
}


@pytest.mark.parametrize("method", ["cat", "svd", "dare"])
@pytest.mark.parametrize("kind", WHOLE)
def test_modules_adapted_as_a_whole_are_combined_weight_by_weight(
    kind: str, method: str, fill: Fill, tmp_path: Path
) -> None:
    model, batch = KINDS[kind].make().eval(), KINDS[kind].batch()
    for seed, task in enumerate("ab"):
        inject(model, AdapterConfig(r=1 + seed, init="pissa" if seed else "kaiming", **WHOLE[kind]), task)
        fill(model, task, seed)
    options = {"cat": {}, "svd": {"r": 9}, "dare": {"r": 9, "density": 1.0}}[method]
    report = combine(model, {"a": 1.5, "b": -1.0}, "mix", method, **options)
    layers = task_layers(model, "mix")
    assert set(report.layers) == set(layers) == set(task_layers(model, "a"))
    for layer in layers.values():
        slots = layer.slots()
        torch.testing.assert_close(
            layer.delta(slots["mix"]),
            1.5 * layer.delta(slots["a"]) - layer.delta(slots["b"]),
            rtol=1e-4,
            atol=1e-5,
        )
    plain = KINDS[kind].make().eval()
    plain.load_state_dict(merged_state_dict(model, "mix"))
    with torch.no_grad():
        torch.testing.assert_close(model(*batch, task="mix"), plain(*batch), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            model(*batch, tasks={"a": 1.5, "b": -1.0}), plain(*batch), rtol=1e-4, atol=1e-5
        )
    short = combine(model, {"a": 1.0, "b": 1.0}, "short", "svd", r=1)
    assert 0 < short.error < 1
    for path, layer in task_layers(model, "short").items():
        slots = layer.slots()
        dense = layer.delta(slots["a"]) + layer.delta(slots["b"])
        missed = float((layer.delta(slots["short"]) - dense).norm() / dense.norm())
        assert short.layers[path].error == pytest.approx(missed, abs=1e-4)


def test_a_module_of_its_own_is_refused_and_its_merged_state_stands_in(fill: Fill) -> None:
    model, x = bare().eval(), torch.randn(5, 12)
    inject(model, AdapterConfig(r=2, targets=("0",), save_modules=("3",)), "a")
    fill(model)
    with pytest.raises(TaskError, match="task 'a' is a module of its own at layer '3'"):
        combine(model, {"a": 1.0}, "b")
    plain = bare().eval()
    plain.load_state_dict(merged_state_dict(model, "a"))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x, task="a"), rtol=1e-4, atol=1e-5)

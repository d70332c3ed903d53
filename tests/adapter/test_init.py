"""Where adapters start: nothing changes, W stays, and PiSSA and OLoRA train as PEFT's do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    GraftError,
    TaskError,
    adapter_parameters,
    base_state_dict,
    init_eva,
    inject,
    load,
    merge,
    route,
    save,
    set_route,
    task_layers,
    unmerge,
)
from orbit.adapter.config import INITS
from tests.laws.peft_oracle import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DENSE_KINDS = [kind for kind in KINDS if "xperts" not in kind and "Multihead" not in kind]
Make = Callable[..., nn.Module]
Fill = Callable[..., None]
STARTED = ("pissa", "olora")
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "gated": {"gated": True},
    "dropout": {"dropout": 0.3},
    "dora with dropout": {"dora": True, "dropout": 0.3},
}


def mlp_of(init: str, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))
    inject(model, AdapterConfig(**{"r": 2, "alpha": 6, "init": init, **options}))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_changes_nothing(init: str, variant: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))
    model, x = model.to(dtype), torch.randn(5, 6).to(dtype)
    before, weights = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    inject(model, AdapterConfig(r=2, alpha=6, init=init, **VARIANTS[variant]))
    assert torch.equal(model.train()(x), before)
    assert torch.equal(model.eval()(x), before)
    assert torch.equal(model(x, tasks={"default": -0.5}), before)
    base = base_state_dict(model)
    assert list(base) == list(weights)
    assert all(torch.equal(base[key], weights[key]) for key in weights)
    merge(model)
    if not model[0].slots()["default"].magnitude:
        assert torch.equal(model(x), before)
    unmerge(model)


@pytest.mark.parametrize("init", INITS)
def test_what_a_and_b_start_as(init: str) -> None:
    model = mlp_of(init, r=3)
    layer = model[0]
    slot = layer.low_rank_slot("default")
    A, B, W, s = slot.down.weight, slot.up.weight, layer.weight, float(slot.up.scale)
    if init in STARTED:
        assert torch.equal(slot.start.down.weight, A)
        assert torch.equal(slot.start.up.weight, B)
    else:
        assert slot.start is None
        assert not B.count_nonzero()
    if init == "orthogonal":
        torch.testing.assert_close(A @ A.T, torch.eye(3))
    if init == "gaussian":
        wide = nn.Sequential(nn.Linear(4000, 4))
        inject(wide, AdapterConfig(r=4, init="gaussian"))
        assert wide[0].low_rank_slot("default").down.weight.std().item() == pytest.approx(1 / 4, rel=0.02)
    if init == "pissa":  # the best rank-3 approximation, by the singular values that are left
        left = torch.linalg.matrix_norm(W - s * B @ A)
        torch.testing.assert_close(left, torch.linalg.svdvals(W)[3:].square().sum().sqrt())
        torch.testing.assert_close(A @ A.T, B.T @ B)
    if init == "olora":
        torch.testing.assert_close(B.T @ B, torch.eye(3))
        torch.testing.assert_close(B @ (B.T @ W), B @ A)


def steps(model: nn.Module, parameters: Any, batch: Tensor, count: int = 3) -> list[float]:
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for _ in range(count):
        loss = model(batch).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("init", STARTED)
@pytest.mark.parametrize("rslora", [False, True])
def test_training_goes_as_in_peft_which_moves_the_base(init: str, rslora: bool) -> None:
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=init, use_rslora=rslora
        ),
    )
    inject(base, AdapterConfig(r=2, alpha=6, targets=("0", "2"), init=init, rslora=rslora))
    ours = {f"base_model.model.{key}": value for key, value in adapter_parameters(base).items()}
    for key, value in theirs.named_parameters():
        if value.requires_grad:
            assert torch.equal(ours[key], value)
    x = torch.randn(5, 6)
    mine = steps(base, adapter_parameters(base).values(), x)
    peers = steps(theirs, [p for p in theirs.parameters() if p.requires_grad], x)
    assert mine == pytest.approx(peers, rel=1e-5)
    assert mine[-1] < mine[0]
    for key, value in theirs.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("init", STARTED)
def test_the_forward_is_that_of_the_dense_weight(init: str, variant: str, fill: Fill) -> None:
    options = {**VARIANTS[variant], "dropout": 0.0}
    model = mlp_of(init, **options).double().eval()
    x = torch.randn(5, 6).double()
    fill(model)
    dense = {}
    for path, layer in task_layers(model, "default").items():
        slot = layer.low_rank_slot("default")
        start = slot.start
        V = layer.weight + slot.coefficient * (
            slot.up.weight @ slot.down.weight - start.up.weight @ start.down.weight
        )
        dense[f"{path}.weight"] = (
            V
            if slot.magnitude is None
            else slot.magnitude.weight[:, None] * V / V.norm(dim=1, keepdim=True).detach()
        )
        A, B = layer.update(slot)
        torch.testing.assert_close(slot.coefficient * B @ A, layer.delta(slot))
    base = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3)).double()
    base.load_state_dict(base_state_dict(model))
    expected = torch.func.functional_call(base, dense, (x,))
    torch.testing.assert_close(model(x), expected)
    parameters = list(adapter_parameters(model).values())
    for got, want in zip(
        torch.autograd.grad(model(x).square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        merge(model)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("init", STARTED)
def test_rows_and_sums_see_the_start(init: str, fill: Fill) -> None:
    model, x = mlp_of(init).eval(), torch.randn(3, 6)
    inject(model, AdapterConfig(r=2), "plain")
    fill(model)
    mixed = model(x, task=["default", None, "plain"])
    for row, task in enumerate(["default", None, "plain"]):
        torch.testing.assert_close(mixed[row], model(x, task=task)[row])
    layer = model[0]
    both = (
        layer.base(x)
        + x @ (0.5 * layer.delta(layer.slots()["default"]) - layer.delta(layer.slots()["plain"])).T
    )
    with route(model, tasks={"default": 0.5, "plain": -1.0}):
        torch.testing.assert_close(layer(x), both)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_start_travels_with_the_model(how: Callable[[nn.Module], nn.Module], fill: Fill) -> None:
    model, x = mlp_of("pissa").eval(), torch.randn(3, 6)
    fill(model)
    assert torch.equal(how(model)(x), model(x))
    again = mlp_of("pissa", alpha=6).eval()
    with torch.no_grad():
        again[0].weight.mul_(2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    state = model.state_dict()
    gone = [key for key in state if key.endswith("lora_A.default.start.weight")]
    assert len(gone) == 2
    del state[gone[0]]
    with pytest.raises(RuntimeError, match=r"lora_A\.default\.start\.weight"):
        again.load_state_dict(state)


@pytest.mark.parametrize(
    "options",
    [{}, {"rslora": True}, {"dora": True}, {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 5}}],
    ids=["lora", "rslora", "dora", "patterns"],
)
@pytest.mark.parametrize("init", STARTED)
def test_on_disk_it_is_a_lora_of_twice_the_rank(
    init: str, options: dict[str, Any], fill: Fill, tmp_path: Path
) -> None:
    model, x = mlp_of(init, **options).eval(), torch.randn(3, 6)
    fill(model)
    save(model, tmp_path / "a", peft=True)
    save(model, tmp_path / "exact")
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.Linear(8, 3))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-5, atol=1e-5)
    load(base, tmp_path / "a", "plain")
    torch.testing.assert_close(base.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    load(base, tmp_path / "exact", "exact")
    assert torch.equal(base.eval()(x, task="exact"), model(x))


def test_an_unknown_init_is_refused() -> None:
    with pytest.raises(ConfigError, match="init must be one of 'kaiming'.*got 'eva'.*init_eva"):
        AdapterConfig(init="eva")
    with pytest.raises(ConfigError, match="got None"):
        AdapterConfig(init=None)  # type: ignore[arg-type]


# -- EVA -----------------------------------------------------------------------------------------------------


def test_eva_finds_the_directions_of_the_inputs() -> None:
    model = mlp_of("kaiming", r=3).train()
    batches = [torch.randn(n, 6) * torch.tensor([3.0, 0.1, 2.0, 0.1, 1.0, 0.1]) for n in (7, 4, 9)]
    before, x = model(batches[0]), torch.cat(batches)
    modes, bits = [m.training for m in model.modules()], base_state_dict(model)
    shares = init_eva(model, batches)
    assert torch.equal(model(batches[0]), before)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, bits[key]) for key, value in base_state_dict(model).items())
    inputs = [x, model[0].base(x).relu()]
    for layer, X in zip((model[0], model[2]), inputs, strict=True):
        A = layer.low_rank_slot("default").down.weight
        torch.testing.assert_close(A @ A.T, torch.eye(3), atol=1e-5, rtol=1e-5)
        V = torch.linalg.svd(X).Vh[:3]
        torch.testing.assert_close(A.T @ A, V.T @ V, atol=1e-4, rtol=1e-4)  # the same subspace
        name = "0" if layer is model[0] else "2"
        S = torch.linalg.svdvals(X).square()
        assert shares[name] == pytest.approx(float(S[:3].sum() / S.sum()), rel=1e-4)


def test_eva_leaves_padding_out(llama: Make, tokens: Tensor) -> None:
    model, other = llama(), llama()
    for one in (model, other):
        inject(one, AdapterConfig(r=2, targets=("q_proj", "down_proj")))
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    init_eva(model, [{"input_ids": tokens, "attention_mask": mask}])
    init_eva(
        other,
        [{"input_ids": tokens[:1, :5]}, {"input_ids": tokens[1:]}],
        forward=lambda m, batch: m(**batch),
    )
    for path, layer in task_layers(model, "default").items():
        A = layer.low_rank_slot("default").down.weight
        B = other.get_submodule(path).low_rank_slot("default").down.weight
        torch.testing.assert_close(A.T @ A, B.T @ B, atol=1e-3, rtol=1e-3)


def test_eva_with_few_directions_kept_is_close() -> None:
    model = nn.Sequential(nn.Linear(40, 4))
    inject(model, AdapterConfig(r=3))
    batches = [torch.randn(30, 40) * 0.7 ** torch.arange(40) for _ in range(6)]
    exact = torch.linalg.svd(torch.cat(batches)).Vh[:3]
    init_eva(model, batches, keep=6)
    A = model[0].low_rank_slot("default").down.weight
    assert torch.linalg.svdvals(A @ exact.T).min() > 0.999  # cosines of the angles between the subspaces


def test_eva_refuses_and_changes_nothing(fill: Fill) -> None:
    model = mlp_of("kaiming", r=3)
    A = model[0].low_rank_slot("default").down.weight.clone()
    with pytest.raises(ConfigError, match="layer '0' saw 2 inputs, too few for rank 3"):
        init_eva(model, [torch.randn(2, 6)])
    with pytest.raises(ConfigError, match="layer '0' saw 0 inputs"):
        init_eva(model, [])
    with pytest.raises(ConfigError, match="keep=2 is below the rank 3"):
        init_eva(model, [torch.randn(9, 6)], keep=2)
    with pytest.raises(ConfigError, match="layer '0' are not finite"):
        init_eva(model, [torch.full((9, 6), torch.nan)])
    assert torch.equal(model[0].low_rank_slot("default").down.weight, A)
    assert not model[0]._forward_pre_hooks
    set_route(model, "default")
    fill(model)
    with pytest.raises(TaskError, match="comes before training"):
        init_eva(model, [torch.randn(9, 6)])
    with pytest.raises(TaskError, match="no task 'x'"):
        init_eva(model, [torch.randn(9, 6)], "x")


def test_eva_finds_the_subspace_that_peft_finds() -> None:
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    # PEFT's EVA subtracts the mean of the inputs; with inputs of mean 0 both look for the same directions.
    half = [torch.randn(20, 12) * 0.6 ** torch.arange(12) for _ in range(3)]
    batches = [torch.cat([x, -x]) for x in half]
    ours = copy.deepcopy(base)
    inject(ours, AdapterConfig(r=3, targets=("0",)))
    init_eva(ours, batches)
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(
            r=3, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
        ),
        low_cpu_mem_usage=True,
    )
    peft.initialize_lora_eva_weights(
        theirs,
        [{"x": x} for x in batches] * 4,
        forward_fn=lambda m, batch: m(batch["x"]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
        show_progress_bar=False,
    )
    A = ours[0].low_rank_slot("default").down.weight
    B = theirs.base_model.model[0].lora_A["default"].weight
    assert torch.linalg.svdvals(A @ B.T).min() > 0.99


# -- every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_every_kind_starts_unchanged_and_then_is_its_dense_weight(
    kind: str, init: str, dora: bool, fill: Fill
) -> None:
    model, batch = KINDS[kind].make(), KINDS[kind].batch()
    before = model(*batch)
    inject(model, AdapterConfig(r=2, alpha=3, init=init, dora=dora, targets=("layer",)))
    layer = model.layer
    slot = layer.low_rank_slot("default")
    assert torch.equal(model.train()(*batch), before)
    A, B = (factor.detach() for factor in layer.factors(slot))
    if init == "orthogonal":
        random = A if A.count_nonzero() else B.mT
        torch.testing.assert_close(random @ random.mT, torch.eye(2), rtol=1e-5, atol=1e-5)
    if init == "pissa":
        left = torch.linalg.matrix_norm(layer.matrix() - slot.up.scale * B @ A)
        torch.testing.assert_close(left, torch.linalg.svdvals(layer.matrix())[2:].square().sum().sqrt())
    fill(model)
    V = layer.matrix() + layer.delta(slot)
    if dora:
        V = slot.magnitude.weight.detach()[:, None] * V / V.norm(dim=1, keepdim=True)
    plain = KINDS[kind].make()
    plain.layer.weight.data.copy_(layer.as_weight(V))
    torch.testing.assert_close(model(*batch), plain(*batch), rtol=1e-4, atol=1e-5)
    merge(model.eval())
    with torch.no_grad():
        torch.testing.assert_close(model(*batch), plain(*batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Embedding with scale_grad_by_freq", "Conv2d with groups", "Conv1D"])
def test_gradients_of_a_start_are_those_of_the_moved_base(kind: str) -> None:
    """The same factors beside W − s·B₀·A₀, as PiSSA's authors do it, get the same gradients."""
    ours, theirs, batch = KINDS[kind].make(), KINDS[kind].make(), KINDS[kind].batch()
    inject(ours, AdapterConfig(r=2, alpha=3, init="pissa", targets=("layer",)))
    inject(theirs, AdapterConfig(r=2, alpha=3, targets=("layer",)))
    slot, other = (model.layer.low_rank_slot("default") for model in (ours, theirs))
    with torch.no_grad():
        other.down.weight.copy_(slot.down.weight)
        other.up.weight.copy_(slot.up.weight)
        theirs.layer.weight -= theirs.layer.as_weight(theirs.layer.delta(other))
    torch.testing.assert_close(ours(*batch), theirs(*batch), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model(*batch).square().sum().backward()
    torch.testing.assert_close(slot.down.weight.grad, other.down.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slot.up.weight.grad, other.up.weight.grad, rtol=1e-4, atol=1e-5)


def test_eva_refuses_layers_without_rows() -> None:
    model = KINDS["Embedding"].make()
    inject(model, AdapterConfig(r=2, targets=("layer",)))
    with pytest.raises(GraftError, match=r"layer 'layer' \(.*Embedding\) does not multiply the rows"):
        init_eva(model, [KINDS["Embedding"].batch()])


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", ["MultiheadAttention", "Experts", "Experts stored (in, out)"])
def test_modules_adapted_as_a_whole_start_unchanged(kind: str, init: str, fill: Fill) -> None:
    model, batch = KINDS[kind].make().requires_grad_(False), KINDS[kind].batch()
    before = model(*batch)
    places = (
        {"targets": ("layer",)}
        if "Multi" in kind
        else {"targets": (), "parameters": ("layer.up", "layer.down")}
    )
    inject(model, AdapterConfig(r=2, init=init, **places))
    assert torch.equal(model(*batch), before)
    for layer in task_layers(model, "default").values():
        slot = layer.slots()["default"]
        assert not layer.delta(slot).count_nonzero()
        A, B = (factor.detach() for factor in layer.factors(slot))
        if init == "orthogonal":
            torch.testing.assert_close(
                A @ A.mT, torch.eye(2).expand(*A.shape[:-2], 2, 2), rtol=1e-5, atol=1e-5
            )
        if init == "pissa":
            left = torch.linalg.matrix_norm(layer.matrix() - slot.up.scale * B @ A)
            torch.testing.assert_close(left, torch.linalg.svdvals(layer.matrix())[..., 2:].norm(dim=-1))
    fill(model)
    assert not torch.equal(model(*batch), before)


def test_eva_knows_transformers_conv1d() -> None:
    model, (x,) = KINDS["Conv1D"].make(), KINDS["Conv1D"].batch()
    inject(model, AdapterConfig(r=2, targets=("layer",)))
    seen: list[Tensor] = []
    with model.layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach())):
        init_eva(model, [x])
    A = model.layer.low_rank_slot("default").down.weight
    V = torch.linalg.svd(seen[0].flatten(0, 1)).Vh[:2]
    torch.testing.assert_close(A.T @ A, V.T @ V, rtol=1e-4, atol=1e-4)

"""nn.MultiheadAttention adapted as a whole, against its own forward with W' written out."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    GraftError,
    adapter_parameters,
    inject,
    merge,
    remove,
    route,
    task_layers,
    unmerge,
)
from orbit.adapter.owners import Slot

EMBED, HEADS = 8, 2


class Attends(nn.Module):
    """Attention under a name, with a key mask."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, HEADS, **options)

    def forward(self, x: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        key, value = others or (x, x)
        return self.attn(x, key, value, **options)


FORMS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "sequence first": {},
    "no bias": {"batch_first": True, "bias": False},
    "kdim and vdim": {"batch_first": True, "kdim": 6, "vdim": 5},
    "bias_k and zeros": {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "gated": {"gated": True},
    "DoRA": {"dora": True},
    "PiSSA": {"init": "pissa"},
    "DoRA from OLoRA": {"init": "olora", "dora": True},
    "orthogonal": {"init": "orthogonal"},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {"need_weights": False},
    "weights": {},
    "weights per head": {"average_attn_weights": False},
    "padded": {
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    },
    "masked": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1), "need_weights": False},
    "masked by head": {
        "attn_mask": torch.rand(3 * HEADS, 5, 5, generator=torch.Generator().manual_seed(5)) > 0.7
    },
}


def make(form: str = "batch first", dtype: torch.dtype = torch.float64) -> Attends:
    torch.manual_seed(3)
    model = Attends(**FORMS[form]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return model


def inputs(form: str = "batch first", dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(8)
    widths = (EMBED, 6, 5) if form == "kdim and vdim" else (EMBED,)
    batches = tuple(torch.randn(3, 5, width, dtype=dtype) for width in widths)
    return (
        batches if FORMS[form].get("batch_first") else tuple(x.transpose(0, 1).contiguous() for x in batches)
    )


def dense(model: nn.Module, task: str, weight: float = 1.0) -> dict[str, Tensor]:
    """W + w·(W' − W) of every projection, from the definition; differentiable."""
    found = {}
    for path, layer in task_layers(model, task).items():
        name = path if path.endswith("_weight") else f"{path}.weight"
        slot = layer.slots()[task]
        assert isinstance(slot, Slot)
        W = model.get_parameter(name)
        V = W + slot.coefficient * slot.up.weight @ slot.down.weight
        if slot.start is not None:
            V = V - slot.coefficient * slot.start.up.weight @ slot.start.down.weight
        if slot.magnitude is not None:
            V = slot.magnitude.weight[:, None] * V / V.detach().norm(dim=1, keepdim=True)
        found[name] = W + weight * (V - W)
    return found


def oracle(model: nn.Module, weights: dict[str, Tensor], *args: Tensor, **options: Any) -> Any:
    with route(model, None):
        return functional_call(model, weights, args, options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_gradients_equal_the_dense_layers(
    form: str, variant: str, fill: Callable[..., None]
) -> None:
    model, x = make(form), inputs(form)
    before = model(*x)[0]
    report = inject(model, AdapterConfig(r=2, alpha=3, targets=("attn",), **VARIANTS[variant]), "a")
    projections = ["in_proj_weight"] if form != "kdim and vdim" else [f"{p}_proj_weight" for p in "qkv"]
    assert set(report.layers) == {"attn.out_proj", *(f"attn.{name}" for name in projections)}
    assert torch.equal(model(*x)[0], before), "a fresh adapter changes nothing"
    fill(model)
    parameters = list(adapter_parameters(model).values())
    wanted = oracle(model, dense(model, "a"), *x)
    wanted_gradients = torch.autograd.grad(wanted[0].square().sum(), parameters)
    got = model(*x)
    gradients = torch.autograd.grad(got[0].square().sum(), parameters)
    assert not torch.allclose(got[0], before)
    for mine, theirs in zip((*got, *gradients), (*wanted, *wanted_gradients), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", ["batch first", "sequence first"])
@pytest.mark.parametrize("grad", [True, False])
def test_one_task_per_row(call: str, form: str, grad: bool, fill: Callable[..., None]) -> None:
    model, (x,) = make(form).eval(), inputs(form)
    inject(model, AdapterConfig(r=2, targets=("attn",)), "a")
    inject(model, AdapterConfig(r=3, dora=True, targets=("attn",)), "b")
    fill(model)
    axis = 0 if FORMS[form].get("batch_first") else 1
    with torch.set_grad_enabled(grad):
        mixed, weights = model(x, task=["b", None, "a"], **CALLS[call])
        for row, task in enumerate(["b", None, "a"]):
            alone, own = model(x, task=task, **CALLS[call])
            torch.testing.assert_close(mixed.select(axis, row), alone.select(axis, row), rtol=1e-9, atol=1e-9)
            if weights is not None:
                torch.testing.assert_close(weights[row], own[row], rtol=1e-9, atol=1e-9)


def test_rows_train_their_own_tasks_alone(fill: Callable[..., None]) -> None:
    model, (x,) = make(), inputs()
    for name in "abc":
        inject(model, AdapterConfig(r=2, targets=("attn",)), name)
    fill(model)
    model(x, task=["b", "a", "b"])[0].square().sum().backward()
    got = {name: p.grad for name, p in adapter_parameters(model).items()}
    assert all((grad is None) == (".c." in name) for name, grad in got.items())
    model.zero_grad()
    model(x[[1]], task="a")[0].square().sum().backward()
    model(x[[0, 2]], task="b")[0].square().sum().backward()
    for name, parameter in adapter_parameters(model).items():
        if ".c." not in name:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-9)


def test_tasks_together_add_their_updates_of_the_weights(fill: Callable[..., None]) -> None:
    model, (x,) = make(), inputs()
    inject(model, AdapterConfig(r=2, targets=("attn",)), "a")
    inject(model, AdapterConfig(r=3, dora=True, targets=("attn",)), "b")
    fill(model)
    first, second = dense(model, "a", 0.5), dense(model, "b", -2.0)
    both = {name: first[name] + second[name] - model.get_parameter(name) for name in first}
    got = model(x, tasks={"a": 0.5, "b": -2.0})[0]
    torch.testing.assert_close(got, oracle(model, both, x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_merging_is_exact_both_ways(dtype: torch.dtype, dora: bool, fill: Callable[..., None]) -> None:
    model, (x,) = make(dtype=dtype).eval(), inputs(dtype=dtype)
    before = model(x)[0]
    inject(model, AdapterConfig(r=2, dora=dora, targets=("attn",)), "a")
    assert torch.equal(model(x)[0], before)
    fill(model)
    state, routed = copy.deepcopy(model.state_dict()), model(x)[0]
    for _ in range(3):
        merge(model)
        torch.testing.assert_close(model(x)[0], routed)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        unmerge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(model(x)[0], routed)
    remove(model, "a")
    assert type(model.attn) is nn.MultiheadAttention
    assert type(model.attn.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert torch.equal(model(x)[0], before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_stand_alone(
    copied: Callable[[Any], Any], fill: Callable[..., None]
) -> None:
    model, (x,) = make(), inputs()
    inject(model, AdapterConfig(r=2, targets=("attn",)), "a")
    fill(model)
    twin, before = copied(model), model(x)[0]
    assert torch.equal(twin(x)[0], before)
    fill(twin)
    assert not torch.equal(twin(x)[0], before)
    assert torch.equal(model(x)[0], before)
    merge(twin)
    assert torch.equal(model(x)[0], before)


def test_a_checkpoint_of_the_base_loads_strictly(fill: Callable[..., None]) -> None:
    base = make().state_dict()
    model, (x,) = make(), inputs()
    inject(model, AdapterConfig(r=2, targets=("attn",)), "a")
    fill(model)
    before = model(x)[0]
    model.load_state_dict(base)
    assert torch.equal(model(x)[0], before)
    model.load_state_dict(model.state_dict())
    partial = {k: v for k, v in model.state_dict().items() if "in_proj_weight.lora_A" not in k}
    with pytest.raises(RuntimeError, match="lora_A"):
        model.load_state_dict(partial)


def test_the_module_is_never_changed_by_a_forward(fill: Callable[..., None]) -> None:
    """Threads share it: a forward under the default in many of them gives what one gives."""
    model, (x,) = make().eval(), inputs()
    inject(model, AdapterConfig(r=2, targets=("attn",)), "a")
    fill(model)
    wanted, found = model(x)[0], []
    threads = [threading.Thread(target=lambda: found.append(model(x)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one, wanted) for one in found)


def test_an_encoder_layers_fast_path_is_closed(fill: Callable[..., None]) -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=True
    )
    x = torch.randn(2, 5, 8)
    inject(encoder, AdapterConfig(r=2, targets=("self_attn",)), "a")
    fill(encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), encoder.train()(x))
        assert not torch.allclose(encoder(x), encoder(x, task=None))


def test_pefts_attention_is_the_same_but_for_out_proj(fill: Callable[..., None]) -> None:
    """PEFT 0.21 merges out_proj's update twice in its forward; half of B there makes up for it, to the bit."""
    from peft import LoraConfig, get_peft_model

    mine, (x,) = make(dtype=torch.float32), inputs(dtype=torch.float32)
    theirs = get_peft_model(make(dtype=torch.float32), LoraConfig(r=2, lora_alpha=4, target_modules=["attn"]))
    inject(mine, AdapterConfig(r=2, alpha=4, targets=("attn",)), "a")
    fill(mine)
    layers = task_layers(mine, "a")
    attention = theirs.base_model.model.attn
    pairs = {"attn.in_proj_weight": attention, "attn.out_proj": attention.base_layer.out_proj}
    with torch.no_grad():
        for path, other in pairs.items():
            slot = layers[path].low_rank_slot("a")
            other.lora_A["default"].weight.copy_(slot.down.weight)
            other.lora_B["default"].weight.copy_(slot.up.weight * (0.5 if path == "attn.out_proj" else 1.0))
    torch.testing.assert_close(mine(x)[0], theirs(x)[0], rtol=1e-5, atol=1e-5)


def test_what_is_refused_leaves_the_model_as_it_was() -> None:
    model = make()
    with pytest.raises(ConfigError, match="dropout=0.1"):
        inject(model, AdapterConfig(r=2, dropout=0.1, targets=("attn",)))
    with pytest.raises(ConfigError, match=r"layer 'attn' has a weight of .* and r is 9"):
        inject(model, AdapterConfig(r=9, targets=("attn",)))
    model.attn.out_proj = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(GraftError, match="layer 'attn' cannot be adapted: its out_proj, a Identity"):
        inject(model, AdapterConfig(r=2, targets=("attn",)))
    assert type(model.attn) is nn.MultiheadAttention
    assert not any("lora" in name for name, _ in model.named_modules())


ROUTES: dict[str, Callable[[str, str, int], dict[str, Any]]] = {
    "one": lambda a, b, i: {"task": a},
    "rows": lambda a, b, i: {"task": [a, b, None] if i % 2 else [None, b, a]},
    "together": lambda a, b, i: {"tasks": {a: 0.5 + i, b: -1.0}},
}


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("kind", ["attention", "experts"])
def test_twenty_switches_compile_one_graph(way: str, kind: str, fill: Callable[..., None]) -> None:
    from torch._dynamo.utils import counters

    from tests.adapter.kinds import test_experts as experts

    model, (x,) = (make(), inputs()) if kind == "attention" else (experts.make(), (experts.batch(),))
    config = AdapterConfig(r=2, targets=("attn",)) if kind == "attention" else experts.config()
    for seed, name in enumerate("abcd"):
        inject(model, config, name)
        fill(model, name, seed)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i in range(20):
        how = ROUTES[way]("abcd"[i % 4], "abcd"[(i + 1 + i // 4 % 3) % 4], i)
        with route(model, how.get("task"), tasks=how.get("tasks")):
            got, wanted = compiled(x), model(x)
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()

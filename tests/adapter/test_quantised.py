"""Adapters on quantised weights: torchao's int8, bitsandbytes' NF4 and LLM.int8, against their dense twins.

The twin is a plain model whose weights are those of the quantised one as its own library dequantises them.
"""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    GraftError,
    MergeError,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    inject,
    inject_lora_file,
    merge,
    remove,
    save,
    set_route,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gated": {"gated": True},
    "pissa": {"init": "pissa"},
    "dropout": {"dropout": 0.5},
    "dora, dropout": {"dora": True, "dropout": 0.5},
}
ROUTES: dict[str, dict[str, Any]] = {
    "one": {"task": "a"},
    "off": {"task": None},
    "rows": {"task": ["b", "a", None, "b"]},
    "sum": {"tasks": {"a": 0.5, "b": -2.0}},
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # LLM.int8 says at every call that it casts to float16
    yield
    logging.disable(logging.NOTSET)


def library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they do on import is theirs
        return pytest.importorskip(name)


def plain() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False), nn.Linear(64, 32))


def torchao_int8() -> nn.Module:
    quantization = library("torchao.quantization")
    model = plain()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(make: Callable[[ModuleType, nn.Linear], nn.Module]) -> nn.Module:
    bnb = library("bitsandbytes")
    model = plain()
    for index in (0, 2, 3):
        layer = model[index]
        quantised = make(bnb, layer)
        quantised.bias = layer.bias
        model[index] = quantised
    return model.to("cpu")  # which quantises


def nf4(nested: bool) -> nn.Module:
    def make(bnb: ModuleType, layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested
        )
        return made

    return bitsandbytes(make)


def llm_int8() -> nn.Module:
    def make(bnb: ModuleType, layer: nn.Linear) -> nn.Module:
        made = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        return made

    return bitsandbytes(make)


BASES: dict[str, Callable[[], nn.Module]] = {
    "torchao int8": torchao_int8,
    "NF4": lambda: nf4(False),
    "NF4, double": lambda: nf4(True),
    "LLM.int8": llm_int8,
}
bases = pytest.mark.parametrize("base", BASES)
variants = pytest.mark.parametrize("variant", VARIANTS)


def dense(model: nn.Module) -> nn.Module:
    """The twin; LLM.int8 multiplies by it in train mode, and rounds the input too in eval mode."""
    twin = plain()
    with torch.no_grad():
        for index in (0, 2, 3):
            W = model[index].weight
            if hasattr(W, "quant_state"):
                true = library("bitsandbytes").functional.dequantize_4bit(W.data, W.quant_state)
            elif hasattr(W, "SCB"):
                scale = W.SCB if W.SCB is not None else model[index].state.SCB
                true = library("bitsandbytes").functional.int8_vectorwise_dequant(W.data, scale)
            else:
                true = W.dequantize()
            twin[index].weight.copy_(true)
    return twin


def x() -> Tensor:
    return torch.randn(8, 5, 64, generator=torch.Generator().manual_seed(1))


def adapt(model: nn.Module, variant: str, fill: Callable[..., None]) -> nn.Module:
    for seed, task in enumerate("ab"):
        torch.manual_seed(seed)
        inject(model, AdapterConfig(r=3 + seed, alpha=6, targets=("re:[023]",), **VARIANTS[variant]), task)
        fill(model, task, seed, 0.1)
    return model


def near(mine: Tensor, true: Tensor, tolerance: float) -> None:
    assert (mine - true).norm() <= tolerance * true.norm(), float((mine - true).norm() / true.norm())


@variants
@bases
def test_a_fresh_task_is_the_base_to_the_bit(base: str, variant: str) -> None:
    model = BASES[base]()
    before = model(x())
    inject(model, AdapterConfig(r=3, targets=("re:[023]",), **VARIANTS[variant]))
    assert torch.equal(model(x()), before)


@pytest.mark.parametrize("route", ROUTES)
@variants
@bases
def test_outputs_and_gradients_are_those_of_the_dense_twin(
    base: str, variant: str, route: str, fill: Callable[..., None]
) -> None:
    model = BASES[base]()
    twin = dense(model)
    grads = []
    for each in (model, twin):
        adapt(each, variant, fill)
        z = x().requires_grad_()
        torch.manual_seed(5)
        y = each(z, **ROUTES[route])
        y.square().sum().backward()
        found = {name: p.grad for name, p in adapter_parameters(each).items()}
        grads.append({"y": y.detach(), "x": z.grad, **found})
    mine, true = grads
    assert mine.keys() == true.keys()
    for name, value in true.items():
        if value is None:
            assert mine[name] is None, name
        else:
            near(mine[name], value, 2e-3 if base == "LLM.int8" else 1e-5)  # it keeps scales in half precision


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("variant", ["lora", "dora", "gated", "pissa", "dora, dropout"])
@bases
def test_under_autocast(base: str, variant: str, inside: bool, fill: Callable[..., None]) -> None:
    """A quantised layer may give float32 there."""
    model = adapt(BASES[base](), variant, fill)
    found = []
    for autocast in (True, False):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x(), task="a")
            if inside:
                y.float().square().mean().backward()
        if not inside:
            y.float().square().mean().backward()
        found.append([y.detach(), *(p.grad for p in adapter_parameters(model, "a").values())])
        model.zero_grad()
    for mine, true in zip(*found, strict=True):
        assert mine is found[0][0] or mine.dtype == torch.float32
        if true.dim():  # a gate's gradient is a sum of what cancels
            near(mine.float(), true, 0.04)


@variants
@bases
def test_training_moves_the_task_alone_also_after_an_evaluation(base: str, variant: str) -> None:
    model = BASES[base]()
    before = copy.deepcopy(model.state_dict())
    inject(model, AdapterConfig(r=3, targets=("re:[023]",), **VARIANTS[variant]))
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.002)
    losses = []
    for step in range(6):
        with torch.no_grad():
            model.eval()(x())
        torch.manual_seed(step % 2)  # two dropout masks
        loss = (model.train()(x()) - 0.3).square().mean()
        loss.backward()
        check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[4] < losses[0]
    after = base_state_dict(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        theirs = after[name]
        if hasattr(value, "dequantize") and type(value) is not Tensor:
            value, theirs = value.dequantize(), theirs.dequantize()
        assert torch.equal(value, theirs), name


@variants
@bases
def test_saved_and_loaded(base: str, variant: str, tmp_path: Path, fill: Callable[..., None]) -> None:
    model = adapt(BASES[base](), variant, fill)
    twin = inject_lora_file(BASES[base](), save(model, tmp_path / "a", "a"), "again")
    assert torch.equal(twin.eval()(x()), model.eval()(x(), task="a"))


@pytest.mark.filterwarnings("ignore:.*")  # PEFT's and bitsandbytes' own
@pytest.mark.parametrize("dora", [False, True])
@bases
def test_pefts_file_computes_what_peft_does(base: str, dora: bool, tmp_path: Path) -> None:
    import peft

    model = BASES[base]()
    model.is_loaded_in_4bit = base.startswith("NF4")  # as transformers marks what it quantised
    model.is_loaded_in_8bit = base == "LLM.int8"
    settings = peft.LoraConfig(
        r=3, target_modules=["0", "2", "3"], use_dora=dora, init_lora_weights=False, bias="none"
    )
    theirs = peft.get_peft_model(model, settings)
    theirs.save_pretrained(tmp_path)
    mine = inject_lora_file(BASES[base](), tmp_path)
    outputs = []
    for each in (theirs, mine):
        z = x().requires_grad_()
        y = each.train()(z)
        y.square().sum().backward()
        outputs.append((y, z.grad))
    near(outputs[1][0], outputs[0][0], 1e-5)
    near(outputs[1][1], outputs[0][1], 1e-5)


@variants
@bases
def test_copied_and_removed(base: str, variant: str, fill: Callable[..., None]) -> None:
    model = adapt(BASES[base](), variant, fill)
    set_route(model, ["a", "b"])
    before = model.eval()(x())
    assert torch.equal(copy.deepcopy(model)(x()), before)
    if base != "torchao int8":  # its layers hold an extra_repr that does not pickle
        assert torch.equal(pickle.loads(pickle.dumps(model))(x()), before)
    bare = BASES[base]()
    y = bare.train()(x())
    remove(model, "a")
    remove(model, "b")
    assert [type(layer) for layer in model] == [type(layer) for layer in bare]
    assert torch.equal(model.train()(x()), y)
    assert [repr(layer) for layer in model] == [repr(layer) for layer in bare]


def test_torchaos_layers_do_not_pickle() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(torchao_int8())


@bases
def test_merging_is_refused(base: str, fill: Callable[..., None]) -> None:
    model = adapt(BASES[base](), "dora", fill)
    before = model(x())
    with pytest.raises(MergeError, match=r"'0' cannot be merged: .* quantised.*; save the task"):
        merge(model, "a")
    assert torch.equal(model(x(), task="b"), before)


@bases
def test_repr_says_beside(base: str) -> None:
    model = BASES[base]()
    inject(model, AdapterConfig(r=3, targets=("0",)))
    assert (
        repr(model).count("bias=True, low-rank beside") + repr(model).count("Tensor'>, low-rank beside") == 1
    )
    assert repr(model[0]).startswith("Grafted")


def test_reading_the_weight_does_not_settle_a_layers_dtype() -> None:
    """Linear4bit computes for ever in the dtype of its first input, which an adapter's A must not be."""
    model = nf4(True)
    inject(model, AdapterConfig(r=3, targets=("0",), dora=True))
    assert not model[0].compute_type_is_set
    assert model[0](x().bfloat16()).dtype == torch.bfloat16
    assert model[0].compute_dtype == torch.bfloat16


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_packed_for_inference_is_refused(nested: bool) -> None:
    """bitsandbytes passes no gradient through one; an adapted layer never packs."""
    model = nf4(nested)
    if not model[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs weights")
    with torch.no_grad():
        model.eval()(x())
    with pytest.raises(GraftError, match="packed the weight of '0'"):
        inject(model, AdapterConfig(r=3, targets=("0",)))
    assert type(model[0]).__name__ == "Linear4bit"
    model = nf4(nested)
    inject(model, AdapterConfig(r=3, targets=("0",)))
    packed = lambda: [hasattr(model[i].weight.quant_state, "packing_format_for_cpu") for i in (0, 2, 3)]  # noqa: E731
    with torch.no_grad():
        model.eval()(x())
        assert packed() == [False, False, False]
        remove(model, "default")
        model(x())
    assert packed() == [True, True, True]

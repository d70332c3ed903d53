"""Every law over every kind of layer × every variant of adapter.

The table and its two oracles are in `peft_oracle.py`: everywhere, dense weights W + ΔW written out from the definition;
PEFT, where it has the cell and computes it right. A cell that PEFT refuses or gets wrong says so in its skip. A new
kind or variant adds one row there and inherits every law.
"""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbit.adapter import (
    AdapterConfig,
    AdapterError,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    inject,
    load,
    merge,
    remove,
    route,
    save,
    task_layers,
    unmerge,
)
from orbit.adapter.kinds.whole import ParameterSite
from tests.laws import peft_oracle as oracle
from tests.laws.peft_oracle import ALPHA, KINDS, VARIANTS, Cell, Factors, R, Skip, result

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

STARTS = ("pissa", "olora")  # they start from the weight: the factors are not free there
OURS = {name: variant for name, variant in VARIANTS.items() if not variant.lora_bias}
ALL = [(kind, variant) for kind in KINDS for variant in OURS]


def refused(kind: str, variant: str) -> str | None:
    """What our table lacks, by the reason that `inject` gives."""
    if KINDS[kind].parameters and OURS[variant].dora:
        return "DoRA is not defined for the stacked weights"
    return None


CELLS = [cell for cell in ALL if refused(*cell) is None]
FREE = [
    (kind, variant) for kind, variant in CELLS if OURS[variant].init == "kaiming"
]  # inits concern the start alone
cells = pytest.mark.parametrize(("kind", "variant"), CELLS)
free = pytest.mark.parametrize(("kind", "variant"), FREE)


def config(kind: str, variant: str, **changes: Any) -> AdapterConfig:
    row, setting = KINDS[kind], OURS[variant]
    fields: dict[str, Any] = {
        "r": R,
        "alpha": ALPHA,
        "dora": setting.dora,
        "rslora": setting.rslora,
        "gated": setting.gated,
        "init": setting.init,
    }
    if row.parameters:
        fields["parameters"] = tuple(f"{row.target}.{name}" for name in row.parameters)
        fields["targets"] = ()
    else:
        fields["targets"] = (row.target,)
    return AdapterConfig(**{**fields, **changes})


def adapt(kind: str, variant: str, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Module:
    model = KINDS[kind].make(dtype).eval()
    torch.manual_seed(4)
    inject(model, config(kind, variant), name)
    return model


def outputs(kind: str, model: nn.Module, dtype: torch.dtype = torch.float32, **call: Any) -> Tensor:
    return result(model(*KINDS[kind].batch(dtype), **call))


def owners(model: nn.Module, name: str = "default") -> dict[str, dict[str, nn.Parameter]]:
    """A task's tensors by the weight that they adapt, named as in `Factors`."""
    found = {}
    for path, layer in task_layers(model, name).items():
        if not layer.carries(name):
            continue
        slot = layer.low_rank_slot(name)
        weight = path if isinstance(layer, ParameterSite) else f"{path}.weight"
        named = {"A": slot.down, "B": slot.up, "m": slot.magnitude, "gate": slot.gate}
        found[weight] = {part: owner.weight for part, owner in named.items() if owner is not None}
    return found


def fill(
    kind: str, variant: str, model: nn.Module, name: str = "default", seed: int = 5
) -> dict[str, Factors]:
    """Give a task the oracle's factors, as training might have left them, and return those."""
    wanted = oracle.random_factors(kind, variant, next(model.parameters()).dtype, seed)
    with torch.no_grad():
        for weight, parts in owners(model, name).items():
            theirs = wanted[weight].tensors()
            assert parts.keys() == theirs.keys()
            for part, parameter in parts.items():
                parameter.copy_(theirs[part].view(parameter.shape))
    return wanted


def trained(kind: str, variant: str, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Module:
    """A task that is no longer where it started, whatever its init."""
    model = adapt(kind, variant, dtype, name)
    noise = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise).to(parameter))
    return model


@functools.cache
def peft_cell(kind: str, variant: str) -> Cell | Skip:
    return oracle.peft_cell(kind, variant)


GROUPS = "PEFT's A sees all channels of a grouped convolution, which no update of its weight does"


def peft_or_skip(kind: str, variant: str) -> Cell:
    cell = peft_cell(kind, variant)
    if isinstance(cell, Skip):
        pytest.skip(f"PEFT: {cell.reason}")
    if cell.wrong:
        pytest.skip(f"PEFT is wrong here: {cell.wrong}")
    return cell


def close(mine: Tensor, true: Tensor, tolerance: float = 1e-5) -> None:
    mine, true = mine.detach(), true.detach()
    error = float((mine - true).abs().max() / true.abs().max().clamp_min(1e-30))
    assert error < tolerance, error


# -- what it computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "variant"), [cell for cell in ALL if refused(*cell)])
def test_what_is_refused_says_why(kind: str, variant: str) -> None:
    with pytest.raises(AdapterError, match=refused(kind, variant)):
        adapt(kind, variant)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_to_the_bit(kind: str, variant: str, dtype: torch.dtype) -> None:
    model = KINDS[kind].make(dtype).eval().requires_grad_(False)
    with torch.set_grad_enabled(
        kind != "MultiheadAttention"
    ):  # torch picks its kernel by what asks for a gradient
        assert torch.equal(outputs(kind, adapt(kind, variant, dtype), dtype), outputs(kind, model, dtype))


@free
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind: str, variant: str) -> None:
    model = adapt(kind, variant)
    factors = fill(kind, variant, model)
    y = outputs(kind, model)
    true = oracle.dense_output(kind, variant, KINDS[kind].make().eval(), factors)
    close(y, true)
    assert not torch.allclose(y, outputs(kind, KINDS[kind].make().eval()), atol=1e-3)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * pull).sum().backward()
    (true * pull).sum().backward()
    for weight, parts in owners(model).items():
        for part, parameter in parts.items():
            theirs = factors[weight].tensors()[part].grad
            scale = factors[weight].B.grad if part == "gate" else theirs  # a sum of thousands that cancel
            error = (parameter.grad - theirs.view(parameter.shape)).norm() / scale.norm().clamp_min(1e-12)
            assert error < 1e-5, (weight, part, float(error))


@cells
def test_merged_it_computes_the_same_and_unmerging_is_exact_after_100_cycles(kind: str, variant: str) -> None:
    model = trained(kind, variant)
    with torch.no_grad():
        routed = outputs(kind, model)
        merge(model)
        close(outputs(kind, model), routed)
        unmerge(model)
        model = trained(kind, variant, torch.bfloat16)
        state = copy.deepcopy(model.state_dict())
        for _ in range(100):
            merge(model)
            unmerge(model)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# -- files ---------------------------------------------------------------------------------------------------


@cells
def test_saved_and_loaded_it_is_the_same(kind: str, variant: str, tmp_path: Path) -> None:
    model, other = trained(kind, variant), KINDS[kind].make().eval()
    load(other, save(model, tmp_path / "a"))
    with torch.no_grad():
        assert torch.equal(outputs(kind, other), outputs(kind, model))
    mine, theirs = adapter_parameters(model), adapter_parameters(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in mine.items())


@cells
def test_a_file_of_peft_loads_and_has_the_keys_that_we_write(kind: str, variant: str, tmp_path: Path) -> None:
    cell = peft_or_skip(kind, variant)
    cell.model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = KINDS[kind].make().eval()
    if kind == "Conv2d with groups":
        with pytest.raises(AdapterError, match="has shape"):
            load(ours, tmp_path / "theirs")
        pytest.skip(GROUPS)
    load(ours, tmp_path / "theirs")
    close(outputs(kind, ours), outputs(kind, cell.model))
    if OURS[variant].init in STARTS:
        return  # theirs is W − s·B₀A₀ + s·B·A without A₀ and B₀; ours has them too
    save(ours, tmp_path / "ours")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("theirs", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())


@cells
def test_peft_loads_what_we_export(kind: str, variant: str, tmp_path: Path) -> None:
    from peft import PeftModel

    plain = {"gated": "LoRA", "gated DoRA": "DoRA"}.get(variant, variant)  # the gate is folded
    if OURS[variant].init in STARTS:
        plain = "LoRA"  # of twice the rank
    peft_or_skip(kind, plain)
    model = trained(kind, variant)
    if kind == "Conv2d with groups":
        with pytest.raises(AdapterError, match="PEFT's A sees all channels"):
            save(model, tmp_path, peft=True)
        pytest.skip(GROUPS)
    theirs = PeftModel.from_pretrained(KINDS[kind].make(), save(model, tmp_path, peft=True)).eval()
    close(outputs(kind, theirs), outputs(kind, model))


# -- tasks and routes ----------------------------------------------------------------------------------------


def three(kind: str, variant: str) -> nn.Module:
    model = trained(kind, variant, name="a")
    for name in ("bb", "ccc"):
        inject(model, config(kind, variant), name)
        noise = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise).to(parameter))
    return model


@free
def test_mixed_rows_are_per_task_runs_and_their_gradients_sum(kind: str, variant: str) -> None:
    model = three(kind, variant)
    n = len(KINDS[kind].batch()[0])
    rows = (["bb", None, "a", "bb", None, "a", "bb"] if n > 3 else ["bb", None, "a"])[:n]
    y = outputs(kind, model, task=rows)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    (y * pull).sum().backward()
    mixed = {name: p.grad for name, p in adapter_parameters(model).items()}
    assert all(p.grad is None for p in adapter_parameters(model, "ccc").values())
    model.zero_grad()
    total = torch.zeros(())
    for task in ("a", "bb", None):
        mine = [row for row, of in enumerate(rows) if of == task]
        alone = result(model(*[x[mine] for x in KINDS[kind].batch()], task=task))
        close(y[mine], alone)
        total = total + (alone * pull[mine]).sum()
    total.backward()
    for task in ("a", "bb"):
        for name, parameter in adapter_parameters(model, task).items():
            assert (mixed[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-7, name


@free
def test_a_weighted_sum_is_linear_in_the_layers_weights(kind: str, variant: str) -> None:
    if kind == "Mixtral's experts":
        pytest.skip("two adapted weights and a router: covered by the experts above")
    model = three(kind, variant)
    with torch.no_grad():
        close(outputs(kind, model, tasks={"bb": 1.0}), outputs(kind, model, task="bb"))
        close(outputs(kind, model, tasks={"bb": 0.0, "a": 1}), outputs(kind, model, task="a"))
        own = dict(KINDS[kind].make().named_parameters())
        weights = {"a": 0.7, "bb": -0.4, "ccc": 1.5}
        changed = {}
        for name, layout in KINDS[kind].weights.items():
            changed[name] = own[name].clone()
            for task, weight in weights.items():
                factors = Factors(
                    **{
                        part: p.view(-1) if part == "m" else p
                        for part, p in owners(model, task)[name].items()
                    }
                )
                dense = oracle.dense_weight(layout, own[name], factors, OURS[variant].scale())
                changed[name] += weight * (dense - own[name])
        true = torch.func.functional_call(KINDS[kind].make().eval(), changed, KINDS[kind].batch())
        close(outputs(kind, model, tasks=weights), result(true))


@free
def test_a_second_task_changes_nothing_of_the_first(kind: str, variant: str) -> None:
    model = trained(kind, variant, name="a")
    before = outputs(kind, model)
    kept = {name: parameter.clone() for name, parameter in adapter_parameters(model, "a").items()}
    inject(model, config(kind, variant), "b")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        outputs(kind, model.train()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert all(torch.equal(p, kept[name]) for name, p in adapter_parameters(model, "a").items())
    assert torch.equal(outputs(kind, model, task="a"), before)
    remove(model, "b")
    assert torch.equal(outputs(kind, model, task="a"), before)


# -- training ------------------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_base_never_moves_and_the_adapter_does(
    kind: str, variant: str, dtype: torch.dtype
) -> None:
    before = KINDS[kind].make(dtype).state_dict()
    model = adapt(kind, variant, dtype)
    fresh = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        outputs(kind, model.train(), dtype).square().sum().backward()
        check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    kept = base_state_dict(model)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert not any(torch.equal(p, fresh[name]) for name, p in adapter_parameters(model).items())
    with torch.no_grad():
        off = outputs(kind, model, dtype, task=None)
        assert not torch.equal(outputs(kind, model, dtype), off)
        remove(model, "default")
        assert torch.equal(outputs(kind, model, dtype), off)
        assert torch.equal(off, outputs(kind, KINDS[kind].make(dtype).eval(), dtype))


@free
def test_checkpointed_under_a_route_that_changed_before_backward(kind: str, variant: str) -> None:
    model = three(kind, variant)
    batch = KINDS[kind].batch()
    plain = outputs(kind, model, task="a").square().sum() + outputs(kind, model, task="bb").square().sum()
    plain.backward()
    true = {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    losses = []
    for task in ("a", "bb"):
        with route(model, task):
            losses.append(
                result(checkpoint(lambda *x: model(*x), *batch, use_reentrant=False)).square().sum()
            )
    with route(model, "ccc"):
        sum(losses).backward()
    grads = {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}
    assert grads.keys() == true.keys()
    for name, grad in grads.items():
        assert (grad - true[name]).norm() <= 1e-5 * true[name].norm(), name


# -- copies --------------------------------------------------------------------------------------------------


@free
def test_copies_compute_the_same_and_train_alone(kind: str, variant: str) -> None:
    model = trained(kind, variant)
    before = outputs(kind, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(kind, twin), before)
        with torch.no_grad():
            for parameter in adapter_parameters(twin).values():
                parameter.add_(0.5)
        assert torch.equal(outputs(kind, model), before)
        assert not torch.equal(outputs(kind, twin), before)


@free
def test_nested_in_another_model(kind: str, variant: str) -> None:
    inner = trained(kind, variant)
    before = outputs(kind, inner)
    outer = nn.Sequential(inner)
    assert torch.equal(outputs(kind, outer), before)
    fresh = nn.Sequential(adapt(kind, variant))
    assert fresh.load_state_dict(outer.state_dict()).missing_keys == []
    assert torch.equal(outputs(kind, fresh), before)
    bare = nn.Sequential(KINDS[kind].make().eval())
    bare.load_state_dict(base_state_dict(outer))
    outer.load_state_dict(bare.state_dict())  # a base checkpoint knows no tasks
    assert torch.equal(outputs(kind, outer), before)


def test_the_table_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Each cell is run, or is skipped with PEFT's reason; `pytest -s` prints the table."""
    lines, count = [], {"run against PEFT": 0, "PEFT wrong": 0, "PEFT has none": 0, "refused here": 0}
    for kind, variant in ALL:
        why, cell = refused(kind, variant), peft_cell(kind, variant)
        if why is not None:
            state, reason = "refused here", why
        elif isinstance(cell, Skip):
            state, reason = "PEFT has none", cell.reason
        else:
            state, reason = ("PEFT wrong", cell.wrong) if cell.wrong else ("run against PEFT", "")
        count[state] += 1
        lines.append(f"{kind} | {variant} | {state} | {reason}")
    print(*lines, count, sep="\n")
    assert sum(count.values()) == len(KINDS) * len(OURS) == 180
    assert count == {"run against PEFT": 63, "PEFT wrong": 31, "PEFT has none": 77, "refused here": 9}

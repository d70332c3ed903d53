"""MoE: transformers' Mixtral block, capacity, padding, the routers' loss, and what of it trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from orbit.adapter import AdapterConfig, inject, merge, route
from orbit.model import MLP, MoE, TopKGate, moe_aux_loss, set_moe_training_mode
from orbit.model.errors import MaskError, SettingError, ShapeError, TargetError
from orbit.model.moe import within_capacity


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def make(**options: object) -> MoE:
    torch.manual_seed(0)
    return MoE(8, 16, 4, **options)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(
        zip(
            dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True
        )
    )


def test_equals_mixtral_on_the_same_weights() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    mixtral = MixtralSparseMoeBlock(config)
    for p in mixtral.parameters():
        nn.init.normal_(p, std=0.2)
    moe = MoE(32, 48, 8)
    moe.load_state_dict(mixtral.state_dict(), strict=True)
    one = torch.randn(3, 17, 32, requires_grad=True)
    two = one.detach().clone().requires_grad_()
    y, wanted = moe(one), mixtral(two)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
    y.sin().sum().backward()
    wanted.sin().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-5)
    for p, q in zip(moe.parameters(), mixtral.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_a_single_expert_is_an_mlp(gated: bool) -> None:
    moe, mlp = MoE(8, 16, 1, top_k=1, gated=gated), MLP(8, 16, activation="silu", gated=gated, bias=False)
    state = {"down_proj.weight": moe.experts.down_proj[0]}
    if gated:
        state["gate_proj.weight"], state["up_proj.weight"] = moe.experts.gate_up_proj[0].chunk(2)
    else:
        state["up_proj.weight"] = moe.experts.up_proj[0]
    mlp.load_state_dict(state)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(moe(x), mlp(x))


# ── capacity and padding ──────────────────────────────────────────────────────────────────────────────────────────


def test_capacity_takes_first_choices_first_in_the_order_of_tokens() -> None:
    indices = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])  # 8 rows of 4 experts: 2 each at factor 1
    kept = within_capacity(indices, 4, 1.0)
    assert kept.tolist() == [[True, True], [True, True], [True, False], [False, False]]
    assert within_capacity(indices, 4, 2.0).sum() == 8
    nobody = torch.tensor([[0, 4], [4, 4], [0, 0]])  # 3 rows: ⌈3/4⌉ = 1 each
    assert within_capacity(nobody, 4, 1.0).tolist() == [[True, False], [False, False], [False, False]]


def test_a_dropped_row_adds_nothing_and_is_counted() -> None:
    x, dropless, tight = torch.randn(2, 10, 8), make(), make(capacity_factor=0.5)
    y = tight(x)
    weights, indices, _ = tight.routing
    kept = within_capacity(indices, 4, 0.5)
    assert tight.dropped == (~kept).sum() > 0
    torch.testing.assert_close(
        y.flatten(0, 1), dropless.experts(x.flatten(0, 1), indices, weights * kept), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(tight.eval()(x), dropless(x))
    assert tight.dropped is None


@pytest.mark.parametrize("factor", [None, 0.7])
def test_padding_changes_nothing(factor: float | None) -> None:
    """Neither the output of real tokens, nor who is dropped, nor the losses."""
    moe = make(capacity_factor=factor)
    x, mask = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = mask[2, :3] = False
    with torch.no_grad():
        alone, losses = moe(x[mask]), (moe.balance_loss(), moe.z_loss())
        dropped = moe.dropped
        y = moe(x, padding_mask=mask)
    torch.testing.assert_close(y[mask], alone)
    assert not y[~mask].any()
    with torch.no_grad():
        torch.testing.assert_close((moe.balance_loss(), moe.z_loss()), losses)
    assert moe.dropped == dropped


# ── the routers' loss ─────────────────────────────────────────────────────────────────────────────────────────────


def test_aux_loss_sums_over_blocks_and_reaches_the_routers_alone() -> None:
    model = nn.Sequential(make(), nn.LayerNorm(8), make())
    model(torch.randn(4, 8))
    first, _, last = model
    loss = moe_aux_loss(model, balance=0.5, z=0.1)
    wanted = 0.5 * (first.balance_loss() + last.balance_loss()) + 0.1 * (first.z_loss() + last.z_loss())
    torch.testing.assert_close(loss, wanted)
    moe_aux_loss(model).backward()
    assert first.gate.weight.grad.abs().sum() > 0 < last.gate.weight.grad.abs().sum()
    assert last.experts.down_proj.grad is None


def test_aux_loss_under_activation_checkpointing() -> None:
    moe, x = make(), torch.randn(4, 8)
    wanted = gradients(moe, moe(x).sin().sum() + moe_aux_loss(moe))
    y = checkpoint(moe, x, use_reentrant=False)
    found = gradients(moe, y.sin().sum() + moe_aux_loss(moe))
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
    checkpoint(moe, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(TargetError, match="use_reentrant=False"):
        moe_aux_loss(moe)
    with torch.no_grad():
        assert moe_aux_loss(moe).isfinite()


@pytest.mark.usefixtures("compiler")
def test_aux_loss_of_a_compiled_model() -> None:
    eager, compiled = make(capacity_factor=1.0), make(capacity_factor=1.0)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = True
    try:
        for seed in range(2):
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
            wanted = gradients(eager, eager(x).sin().sum() + moe_aux_loss(eager))
            found = gradients(compiled, call(x).sin().sum() + moe_aux_loss(compiled))
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name])
            assert compiled.dropped == eager.dropped
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_copies_and_pickles_leave_the_last_forward_behind() -> None:
    moe = make(capacity_factor=1.0)
    moe(torch.randn(3, 8))
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert twin.routing is twin.dropped is None
        assert torch.equal(twin.experts.down_proj, moe.experts.down_proj)
    assert moe.routing is not None


def test_aux_loss_needs_a_block_that_has_run() -> None:
    with pytest.raises(TargetError, match="found no MoE block"):
        moe_aux_loss(nn.Linear(2, 2))
    with pytest.raises(TargetError, match="routed nothing yet"):
        moe_aux_loss(make())


# ── what trains ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_set_moe_training_mode(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(make(), nn.Linear(8, 8), make())
    for mode, router, experts in (
        ("router_only", True, False),
        ("experts_only", False, True),
        ("all", True, True),
    ):
        assert set_moe_training_mode(model, mode) == 2
        for moe in (model[0], model[2]):
            assert moe.gate.weight.requires_grad is router
            assert {p.requires_grad for p in moe.experts.parameters()} == {experts}
        assert model[1].weight.requires_grad
    assert capsys.readouterr().out == ""
    set_moe_training_mode(model, "router_only", verbose=True)
    assert "2 MoE blocks: routers train, experts are frozen" in capsys.readouterr().out
    model(torch.randn(3, 8)).sum().backward()
    assert model[0].gate.weight.grad is not None
    assert model[0].experts.down_proj.grad is None


def test_experts_are_adapted_as_parameters() -> None:
    moe, x = make(), torch.randn(2, 5, 8)
    before = moe(x)
    targets = ("experts.gate_up_proj", "experts.down_proj")
    report = inject(moe, AdapterConfig(r=2, targets=(), parameters=targets), "a")
    assert report.layers == targets
    torch.testing.assert_close(moe(x), before, rtol=0, atol=0)
    with torch.no_grad():
        for name, p in moe.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    after = moe(x)
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert all(p.grad is not None for name, p in moe.named_parameters() if "lora_" in name)
    with route(moe, None):
        torch.testing.assert_close(moe(x), before, rtol=0, atol=0)
    merge(moe.eval(), "a")
    torch.testing.assert_close(moe(x), after, rtol=1e-5, atol=1e-6)


# ── its arguments ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_gate_of_ones_own() -> None:
    gate = TopKGate(8, 4, k=3, noise=0.1)
    moe = MoE(8, 16, 4, gate=gate)
    assert moe.gate is gate
    moe(torch.randn(3, 8))
    assert moe.routing.indices.shape == (3, 3)
    with pytest.raises(SettingError, match=r"chooses 3 of 4 experts.*top_k=2"):
        MoE(8, 16, 4, 2, gate=gate)
    with pytest.raises(SettingError, match="num_experts=5"):
        MoE(8, 16, 5, gate=gate)


def test_refused() -> None:
    with pytest.raises(SettingError, match="k=5: a token can go to 1 to 4"):
        MoE(8, 16, 4, 5)
    with pytest.raises(SettingError, match="capacity_factor=0"):
        make(capacity_factor=0)
    moe, x = make(), torch.randn(2, 5, 8)
    with pytest.raises(ShapeError, match="width 7"):
        moe(torch.randn(2, 7))
    with pytest.raises(MaskError, match=r"int64.*padding_mask\.bool\(\)"):
        moe(x, padding_mask=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(MaskError, match=r"\(2, 4\).*must have \(2, 5\)"):
        moe(x, padding_mask=torch.ones(2, 4, dtype=torch.bool))
    assert moe.routing is None

"""TopKGate: Mixtral's and Switch's weights, and the two losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.init import zeros_
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from orbit.model import TopKGate, load_balancing_loss, router_z_loss
from orbit.model.errors import SettingError, ShapeError


def test_mixtral_normalises_and_switch_does_not() -> None:
    x = torch.randn(6, 8)
    mixtral, switch = TopKGate(8, 4), TopKGate(8, 4, k=1)
    weights, indices, logits = mixtral(x)
    torch.testing.assert_close(weights, F.softmax(logits.gather(1, indices), -1))
    weights, indices, logits = switch(x)
    torch.testing.assert_close(weights, F.softmax(logits, -1).amax(-1, keepdim=True))
    assert torch.equal(indices[:, 0], logits.argmax(-1))
    shares = TopKGate(8, 4, k=2, normalize=False)(x).weights.sum(-1)
    assert (shares < 1).all()


def test_noise_only_in_training() -> None:
    x, gate = torch.randn(6, 8), TopKGate(8, 4, noise=1.0)
    clean = F.linear(x, gate.weight)
    assert not torch.allclose(gate(x).logits, clean)
    torch.testing.assert_close(gate.eval()(x).logits, clean)


def test_the_choice_is_made_in_float32() -> None:
    routing = TopKGate(8, 4, dtype=torch.bfloat16)(torch.randn(6, 8).bfloat16())
    assert routing.weights.dtype is routing.logits.dtype is torch.float32


def test_balance_is_one_for_a_uniform_router_and_e_for_a_crowded_one() -> None:
    gate = TopKGate(8, 4)
    zeros_(gate.weight)
    _, indices, logits = gate(torch.randn(50, 8))
    assert load_balancing_loss(logits, indices).item() == pytest.approx(1)
    assert router_z_loss(logits).item() == pytest.approx(torch.tensor(4.0).log().square().item())
    crowd = torch.tensor([[50.0, 0, 0, 0]]).repeat(10, 1)
    assert load_balancing_loss(crowd, crowd.argmax(-1, keepdim=True)).item() == pytest.approx(4)


def test_balance_is_transformers_over_k_with_padding_left_out() -> None:
    _, indices, logits = TopKGate(8, 4)(torch.randn(3, 5, 8))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for m in (None, mask):
        wanted = load_balancing_loss_func((logits.flatten(0, 1),), 4, 2, m)
        torch.testing.assert_close(load_balancing_loss(logits, indices, m), wanted / 2)
    torch.testing.assert_close(router_z_loss(logits, mask), logits.logsumexp(-1).square()[mask].mean())
    nobody = torch.zeros_like(mask)
    assert load_balancing_loss(logits, indices, nobody) == router_z_loss(logits, nobody) == 0


def test_the_balance_loss_moves_a_crowded_router_apart() -> None:
    torch.manual_seed(0)
    gate, x = TopKGate(8, 4, k=1), torch.randn(200, 8) + 2
    with torch.no_grad():
        gate.weight[0] = 0.3  # nearly everyone goes to expert 0
    before = load_balancing_loss(gate(x).logits, gate(x).indices).item()
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        _, indices, logits = gate(x)
        load_balancing_loss(logits, indices).backward()
        optimizer.step()
    assert before > 2
    assert load_balancing_loss(gate(x).logits, gate(x).indices).item() < 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k=5: a token can go to 1 to 4 of 4 experts"),
        ({"k": 0}, "k=0"),
        ({"k": 1, "normalize": True}, "learns nothing"),
        ({"noise": -1.0}, "noise=-1"),
    ],
)
def test_refused(arguments: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        TopKGate(8, 4, **arguments)


def test_another_width_is_refused() -> None:
    with pytest.raises(ShapeError, match="width 7.*in_features=8"):
        TopKGate(8, 4)(torch.randn(2, 7))

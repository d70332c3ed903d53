"""The gates without experts: their equations and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from orbit.model import ContextGate, GLUGate, SigmoidGate, SoftmaxGate, TanhGate
from orbit.model.errors import SettingError, ShapeError


def test_sigmoid_and_tanh() -> None:
    x = torch.randn(2, 3, 8)
    for cls, squash in ((SigmoidGate, torch.sigmoid), (TanhGate, torch.tanh)):
        gate = cls(8, 6)
        torch.testing.assert_close(gate(x), squash(gate.proj(x)))
        assert cls(8)(x).shape == x.shape


def test_softmax_shares_a_whole_and_its_temperature_sharpens() -> None:
    x, gate = torch.randn(4, 8), SoftmaxGate(8, 5, temperature=0.5)
    torch.testing.assert_close(gate(x), F.softmax(gate.proj(x) / 0.5, -1))
    half = SoftmaxGate(8, 300).to(torch.bfloat16)(x.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float().sum(-1), torch.ones(4), rtol=0, atol=1e-2)


def test_glu_is_torchs() -> None:
    x, gate = torch.randn(2, 3, 8), GLUGate(8, 6)
    torch.testing.assert_close(gate(x), nn.GLU()(gate.proj(x)))
    swiglu = GLUGate(8, 6, activation="silu")
    value, opening = swiglu.proj(x).chunk(2, -1)
    torch.testing.assert_close(swiglu(x), value * F.silu(opening))


def test_context_of_a_sample_and_of_a_position() -> None:
    gate, x, c = ContextGate(8, 3, 6), torch.randn(2, 5, 8), torch.randn(2, 3)
    wide = c[:, None].expand(2, 5, 3)
    torch.testing.assert_close(gate(x, c), torch.sigmoid(gate.proj(torch.cat((x, wide), -1))))
    torch.testing.assert_close(gate(x, wide), gate(x, c))
    assert not torch.allclose(gate(x, c), gate(x, c.flip(0)))


def test_refused() -> None:
    for build in (SigmoidGate, TanhGate, SoftmaxGate, GLUGate):
        with pytest.raises(SettingError, match="out_features=0"):
            build(8, 0)
    with pytest.raises(SettingError, match="temperature=0"):
        SoftmaxGate(8, temperature=0)
    with pytest.raises(SettingError, match="did you mean 'sigmoid'"):
        GLUGate(8, activation="sigmoyd")
    with pytest.raises(ShapeError, match=r"give one a sample, \(B, context_features\)"):
        ContextGate(8, 3)(torch.randn(2, 5, 8), torch.randn(4, 3))

"""`DepthwiseSeparableConv` against torch's functions, and against the dense convolution that it factorises."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from orbit.model import DepthwiseSeparableConv
from orbit.model.errors import SettingError, ShapeError


def test_with_norms_it_is_mobilenets() -> None:
    block = DepthwiseSeparableConv(4, 6, 5, stride=2)
    x = torch.randn(3, 4, 9, 8)
    first, second = block.depthwise, block.pointwise

    def normed(h: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        return F.relu(F.batch_norm(h, None, None, norm.weight, norm.bias, training=True))

    h = normed(F.conv2d(x, first.conv.weight, stride=2, padding=2, groups=4), first.norm)
    torch.testing.assert_close(block(x), normed(F.conv2d(h, second.conv.weight), second.norm))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_bare_it_is_a_dense_convolution_of_rank_one_kernels(dim: int) -> None:
    block = DepthwiseSeparableConv(4, 6, 3, dilation=2, dim=dim, norm=None, activation=None, between=False)
    x = torch.randn(2, 4, *(9, 8, 7)[:dim])
    dense = block.pointwise.conv.weight * block.depthwise.conv.weight.squeeze(1)  # (6, 4, ...)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dim - 1]
    wanted = conv(x, dense, block.pointwise.conv.bias, padding=2, dilation=2)
    torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=1e-5)


def test_between_the_halves() -> None:
    def names(**settings: object) -> list[str]:
        return list(dict(DepthwiseSeparableConv(4, 6, **settings).named_parameters()))  # type: ignore[arg-type]

    norms = ["norm.weight", "norm.bias"]
    assert names() == [
        "depthwise.conv.weight",
        *(f"depthwise.{n}" for n in norms),
        "pointwise.conv.weight",
        *(f"pointwise.{n}" for n in norms),
    ]
    assert names(between=False) == [
        "depthwise.conv.weight",
        "pointwise.conv.weight",
        *(f"pointwise.{n}" for n in norms),
    ]


def test_bad_input() -> None:
    with pytest.raises(SettingError, match="in_channels 0 must be at least 1"):
        DepthwiseSeparableConv(0, 4)
    with pytest.raises(ShapeError, match=r"\(B, 4, H, W\), not \(2, 3, 8, 8\)"):
        DepthwiseSeparableConv(4, 6)(torch.randn(2, 3, 8, 8))

"""`ConvBlock` against the same written with torch's functions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from orbit.model import ConvBlock
from orbit.model.errors import SettingError, ShapeError

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_it_is_convolution_norm_and_activation(dim: int, pre_norm: bool) -> None:
    block = ConvBlock(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, dim=dim, pre_norm=pre_norm)
    x = torch.randn(5, 4, *(7, 8, 9)[:dim])
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)

    def normed(h: torch.Tensor) -> torch.Tensor:
        return F.relu(F.batch_norm(h, None, None, block.norm.weight, block.norm.bias, training=True))

    conv = partial(CONVS[dim], weight=block.conv.weight, stride=2, padding=2, dilation=2, groups=2)
    wanted = conv(normed(x), bias=block.conv.bias) if pre_norm else normed(conv(x))
    torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize(
    ("norm", "over"),
    [("batch", (0, 3, 4)), ("group", (2, 3, 4)), ("instance", (3, 4)), ("layer", (1, 2))],
)
def test_a_norm_has_the_statistics_that_it_says(norm: str, over: tuple[int, ...]) -> None:
    y = ConvBlock(3, 48, norm=norm, activation=None)(torch.randn(4, 3, 6, 5))
    grouped = y.reshape(4, 16, 3, 6, 5)  # gcd(32, 48) = 16 groups
    mean, var = grouped.mean(over), grouped.var(over, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones_like(var), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 3), ((3, 7), (2, 1))])
def test_an_odd_kernel_keeps_the_size(kernel: int | tuple[int, int], dilation: int | tuple[int, int]) -> None:
    assert ConvBlock(2, 3, kernel, dilation=dilation)(torch.randn(1, 2, 9, 7)).shape == (1, 3, 9, 7)


def test_a_bias_is_where_no_norm_takes_it_away() -> None:
    assert ConvBlock(2, 3).conv.bias is None
    assert ConvBlock(2, 3, bias=True).conv.bias is not None
    assert ConvBlock(2, 3, norm=None).conv.bias is not None
    assert ConvBlock(2, 3, pre_norm=True).conv.bias is not None


def test_functions_and_modules_stand_in_for_names() -> None:
    prelu = nn.PReLU()
    block = ConvBlock(2, 4, norm=lambda channels: nn.GroupNorm(2, channels), activation=prelu)
    assert isinstance(block.norm, nn.GroupNorm)
    assert block.norm.num_groups == 2
    assert isinstance(block.act, nn.PReLU)
    assert block.act is not prelu, "each place has weights of its own"
    assert "act.weight" in dict(block.named_parameters())
    x = torch.randn(1, 2, 4, 4)
    square = ConvBlock(2, 4, norm=None, activation=torch.square)
    torch.testing.assert_close(square(x), square.conv(x) ** 2)


def test_dropout_is_of_training() -> None:
    block = ConvBlock(2, 4, norm=None, activation=None, dropout=0.5)
    x = torch.randn(2, 2, 16, 16)
    share = (block(x) == 0).float().mean()
    assert 0.45 < share < 0.55
    torch.testing.assert_close(block.eval()(x), block.conv(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_channels": 7, "groups": 2}, "out_channels 7 is no multiple of groups 2: choose 6 or 8"),
        ({"groups": 8}, "in_channels 4 is no multiple of groups 8: choose 8"),
        ({"in_channels": 0}, "in_channels 0 must be at least 1"),
        ({"norm": "bacth"}, "norm 'bacth' is none of batch, .*; did you mean 'batch'?"),
        ({"activation": "rulu"}, "activation 'rulu' is none of relu, .*; did you mean 'relu'?"),
        ({"activation": nn.ReLU}, "activation <class .*ReLU'> is none of .* or a module"),
        ({"dim": 4}, "dim=4: a convolution runs over 1, 2 or 3 dimensions"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\) must be an int of at least 1, or 2 of them"),
        ({"stride": 0}, "stride=0 must be"),
        ({"padding": -1}, "padding=-1 must be an int of at least 0"),
        ({"dropout": 1.0}, "dropout=1.0 is no probability"),
    ],
)
def test_settings_that_no_block_can_have(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ConvBlock(**{"in_channels": 4, "out_channels": 6, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 5, 8, 8), (3, 8, 8)])
def test_inputs_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"ConvBlock takes a tensor of shape \(B, 3, H, W\), not"):
        ConvBlock(3, 4)(torch.randn(shape))

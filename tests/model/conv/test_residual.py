"""`ResBasicBlock` against the paper's equation in torch's functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.model import ResBasicBlock
from orbit.model.errors import SettingError, ShapeError


def normed(h: Tensor, norm: nn.Module) -> Tensor:
    return F.batch_norm(h, None, None, norm.weight, norm.bias, training=True)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(("out", "stride"), [(4, 1), (6, 1), (4, 2), (6, 3)])
@pytest.mark.parametrize("spread", [1, 2])
def test_it_is_the_paper_s_block(dim: int, out: int, stride: int, spread: int) -> None:
    block = ResBasicBlock(4, out, stride=stride, dilation=spread, groups=spread, dim=dim)
    for p in block.parameters():
        nn.init.normal_(p)
    conv = (F.conv1d, F.conv2d)[dim - 1]
    wide = {"padding": spread, "dilation": spread, "groups": spread}
    x = torch.randn(3, 4, *(9, 8)[:dim])
    h = F.relu(normed(conv(x, block.conv1.conv.weight, stride=stride, **wide), block.conv1.norm))
    h = normed(conv(h, block.conv2.conv.weight, **wide), block.conv2.norm)
    carried = x
    if out != 4 or stride > 1:
        carried = normed(conv(x, block.shortcut.conv.weight, stride=stride), block.shortcut.norm)
    else:
        assert list(block.shortcut.parameters()) == []
    torch.testing.assert_close(block(x), F.relu(h + carried), atol=1e-4, rtol=1e-4)


def test_wide_kernels_and_dilation_keep_the_shapes_together() -> None:
    block = ResBasicBlock(4, 8, kernel_size=(5, 3), stride=(1, 2), dilation=(2, 3), groups=2)
    assert block(torch.randn(2, 4, 7, 8)).shape == (2, 8, 7, 4)


def test_dropout_lies_between_the_convolutions() -> None:
    block = ResBasicBlock(2, 2, dropout=0.5, norm=None)
    seen: list[Tensor] = []
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    y = block(torch.randn(4, 2, 16, 16))
    assert (seen[0] == 0).float().mean() > 0.6  # half by ReLU, half of the rest by dropout
    assert (y == 0).float().mean() < 0.6


def test_bad_input() -> None:
    with pytest.raises(SettingError, match="kernel_size 4 is even, and ResBasicBlock .*: choose 3 or 5"):
        ResBasicBlock(4, 4, kernel_size=4)
    with pytest.raises(SettingError, match="dim=0"):
        ResBasicBlock(4, 4, dim=0)
    with pytest.raises(ShapeError, match=r"\(B, 4, H, W\)"):
        ResBasicBlock(4, 4)(torch.randn(2, 4, 8))

"""`TCN` against Bai et al.'s equations in torch's functions; how far back it sees; streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.model import TCN, auto_initialize
from orbit.model.errors import SettingError, ShapeError


def causal(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv1d(F.pad(x, (dilation * (weight.shape[-1] - 1), 0)), weight, bias, dilation=dilation)


def test_it_is_the_paper_s_network() -> None:
    tcn = TCN(3, [4, 4, 5], kernel_size=2, dropout=0.0)
    for p in tcn.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 3, 20)
    state = tcn.state_dict()
    h = x
    for i in range(3):
        inner = h
        for conv in ("conv1", "conv2"):
            name = f"blocks.{i}.{conv}."
            g, v = (state[f"{name}parametrizations.weight.original{j}"] for j in (0, 1))
            weight = g * v / v.flatten(1).norm(dim=1)[:, None, None]
            inner = F.relu(causal(inner, weight, state[f"{name}bias"], 2**i))
        name = f"blocks.{i}.shortcut."
        carried = F.conv1d(h, state[f"{name}weight"], state[f"{name}bias"]) if i in (0, 2) else h
        assert (f"{name}weight" in state) == (i in (0, 2))
        h = F.relu(inner + carried)
    torch.testing.assert_close(tcn(x), h, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "levels"), [(1, 2), (2, 3), (3, 1), (3, 3), (5, 2)])
def test_the_receptive_field_is_what_reaches_an_output(kernel: int, levels: int) -> None:
    tcn = TCN(1, [3] * levels, kernel, dropout=0.0, activation="tanh").double()
    assert tcn.receptive_field == 1 + 2 * (kernel - 1) * (2**levels - 1)
    x = torch.randn(1, 1, 80, dtype=torch.float64, requires_grad=True)
    tcn(x)[0, :, -1].sum().backward()
    reached = x.grad[0, 0].nonzero().flatten()
    assert reached.min() == 80 - tcn.receptive_field
    assert len(reached) == tcn.receptive_field


@pytest.mark.parametrize("norm", ["weight", "layer", "batch", None])
def test_a_stream_equals_the_whole(norm: str | None) -> None:
    tcn = TCN(2, [3, 4], dropout=0.2, norm=norm).train()
    tcn(torch.randn(8, 2, 30))  # running statistics that are not 0 and 1
    tcn.eval()
    x, memory = torch.randn(2, 2, 17), {}
    found = torch.cat([tcn(chunk, memory) for chunk in x.split([1, 1, 5, 2, 8], dim=-1)], dim=-1)
    torch.testing.assert_close(found, tcn(x), atol=1e-5, rtol=1e-5)


def test_batch_norm_s_statistics_are_of_all_steps_in_training() -> None:
    """What the docstring warns of."""
    tcn = TCN(2, [4], dropout=0.0, norm="batch")
    x = torch.randn(2, 2, 12)
    changed = torch.cat((x[..., :6], -2 * x[..., 6:]), dim=-1)
    assert not torch.allclose(tcn(x)[..., :6], tcn(changed)[..., :6])


def test_dropout_takes_whole_channels() -> None:
    block = TCN(2, [64], dropout=0.5).blocks[0]
    seen: list[Tensor] = []
    block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(torch.randn(4, 2, 50))
    dead = (seen[0] == 0).all(dim=-1).float().mean()
    assert 0.4 < dead < 0.65


def test_it_is_initialised_anew_after_the_meta_device() -> None:
    with torch.device("meta"):
        tcn = TCN(2, [4, 4])
    tcn.to_empty(device="cpu")
    with torch.no_grad():
        for p in tcn.parameters():
            p.fill_(float("nan"))
    for module in tcn.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in tcn.parameters())
    bound = 1 / (4 * 3) ** 0.5
    weight = tcn.blocks[1].conv1.weight
    assert 0.5 * bound < weight.abs().max() <= bound * 1.0001, "as nn.Conv1d draws its weight"


def test_weight_normalised_convolutions_know_their_own_initialisation() -> None:
    report = auto_initialize(TCN(2, [4]))
    assert all("conv" in name for name in report.untouched)
    assert report.counts == {"conv": 1}


def test_bad_input() -> None:
    with pytest.raises(SettingError, match="num_channels is empty"):
        TCN(2, [])
    with pytest.raises(SettingError, match="norm 'group' is none of weight, layer, batch, .* the future"):
        TCN(2, [4], norm="group")
    with pytest.raises(SettingError, match="out_channels 0 must be at least 1"):
        TCN(2, [4, 0])
    with pytest.raises(ShapeError, match=r"TCN takes a tensor of shape \(B, 2, T\), not \(1, 3, 9\)"):
        TCN(2, [4])(torch.randn(1, 3, 9))

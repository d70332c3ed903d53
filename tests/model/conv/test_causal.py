"""`CausalConv1d`: zeros before the start, and a stream that equals the whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orbit.adapter import AdapterConfig, inject
from orbit.model import CausalConv1d
from orbit.model.errors import CacheError, SettingError, ShapeError


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "dilation", "groups"), [(1, 1, 1), (3, 1, 1), (2, 4, 2), (4, 3, 1)])
def test_it_is_a_convolution_of_what_was(stride: int, kernel: int, dilation: int, groups: int) -> None:
    conv = CausalConv1d(4, 6, kernel, stride, dilation, groups)
    x = torch.randn(2, 4, 13)
    padded = torch.cat((torch.zeros(2, 4, dilation * (kernel - 1)), x), dim=-1)
    wanted = F.conv1d(padded, conv.weight, conv.bias, stride, 0, dilation, groups)
    assert wanted.shape[-1] == (13 - 1) // stride + 1
    torch.testing.assert_close(conv(x), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("chunk", [2, 4, 12])
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 2), (2, 7)])
def test_a_stream_equals_the_whole(stride: int, chunk: int, kernel: int, dilation: int) -> None:
    conv = CausalConv1d(3, 5, kernel, stride, dilation)
    x = torch.randn(2, 3, 24)
    memory: dict = {}
    found = torch.cat([conv(part, memory) for part in x.split(chunk, dim=-1)], dim=-1)
    torch.testing.assert_close(found, conv(x), atol=1e-6, rtol=1e-6)
    assert memory[conv].shape == (2, 3, conv.past)
    assert memory[conv].untyped_storage().nbytes() == memory[conv].numel() * 4, "the chunk is not kept alive"


def test_gradients_flow_through_a_stream() -> None:
    conv, x = CausalConv1d(2, 2, 3), torch.randn(1, 2, 8, requires_grad=True)
    memory: dict = {}
    torch.cat([conv(part, memory) for part in x.split(2, dim=-1)], dim=-1).square().sum().backward()
    streamed, x.grad = x.grad, None
    conv(x).square().sum().backward()
    torch.testing.assert_close(streamed, x.grad)


def test_a_recomputed_chunk_is_refused_unless_the_memory_is_its_own() -> None:
    conv, x = CausalConv1d(2, 2, 3), torch.randn(1, 2, 8, requires_grad=True)
    memory: dict = {}
    parts = [checkpoint(conv, part, memory, use_reentrant=False) for part in x.split(4, dim=-1)]
    with pytest.raises(
        CacheError, match=r"gone on since this chunk.*Run checkpointed layers without a memory"
    ):
        torch.cat(parts, dim=-1).square().sum().backward()

    def stream(x: torch.Tensor) -> torch.Tensor:
        memory: dict = {}
        return torch.cat([conv(part, memory) for part in x.split(2, dim=-1)], dim=-1)

    found, wanted = (
        torch.autograd.grad(y.square().sum(), x)[0]
        for y in (checkpoint(stream, x, use_reentrant=False), stream(x))
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_memory_of_another_batch_or_a_chunk_between_two_outputs() -> None:
    conv, memory = CausalConv1d(2, 2, 3, stride=2), {}
    conv(torch.randn(3, 2, 4), memory)
    before = memory[conv].clone()
    with pytest.raises(CacheError, match="holds 3 rows and the chunk has 1: begin another stream"):
        conv(torch.randn(1, 2, 4), memory)
    with pytest.raises(ShapeError, match="a chunk of 3 steps is no multiple of stride 2"):
        conv(torch.randn(3, 2, 3), memory)
    torch.testing.assert_close(memory[conv], before, rtol=0, atol=0)
    with pytest.raises(ShapeError, match=r"takes a tensor of shape \(B, 2, T\), not \(2, 4\)"):
        conv(torch.randn(2, 4))
    with pytest.raises(SettingError, match="kernel_size=0 must be an int of at least 1"):
        CausalConv1d(2, 2, 0)


def test_an_adapter_sees_the_padded_input() -> None:
    """The graft goes between the class and torch's: merged or beside, streamed or whole, the output is the same."""
    conv = CausalConv1d(2, 4, 3, dilation=2)
    net = torch.nn.Sequential(conv)
    inject(net, AdapterConfig(r=2, targets=("0",)), "a")
    for p in net.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 2, 10)
    slot_weight = conv.merged_weight(conv.low_rank_slot("a"))
    wanted = F.conv1d(F.pad(x, (4, 0)), slot_weight, conv.bias, dilation=2)
    torch.testing.assert_close(net(x), wanted, atol=1e-4, rtol=1e-4)
    memory: dict = {}
    streamed = torch.cat([conv(part, memory) for part in x.split(1, dim=-1)], dim=-1)
    torch.testing.assert_close(streamed, wanted, atol=1e-4, rtol=1e-4)

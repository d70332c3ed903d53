"""Laws of the building blocks: what every row of `blocks.py` keeps.

gradients        as finite differences say, in float64, of inputs and parameters
precision        bfloat16 weights, and autocast over float32 ones, stay near the float32 result
compile          one graph, forward and backward, equal to eager
state            a state dict makes a twin, by way of the meta device too; deepcopy as well
device and dtype the constructor's arguments reach every part
rows             samples do not know of each other; none are allowed
tokens, causal   the symmetries that a row claims
recomputation    activation checkpointing changes no gradient
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.laws.blocks import BLOCKS, Block


@pytest.fixture
def compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(params=BLOCKS)
def row(request: pytest.FixtureRequest) -> Block:
    row = BLOCKS[request.param]
    law = request.function.__name__.removeprefix("test_")
    if law in row.without:
        pytest.skip(row.without[law])
    return row


def passes(row: Block, block: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of a fixed weighting of it to the inputs and parameters that have one."""
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    output = row.call(block, *inputs)
    wave = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).reshape(output.shape)
    (output * wave.to(output)).sum().backward()
    leaves = [*inputs, *block.parameters()]
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Apart by less than `tolerance` of the largest wanted entry."""
    distance = (found.double() - wanted.double()).abs().max()
    assert distance <= tolerance * wanted.double().abs().max().clamp_min(1e-3)


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_gradients(row: Block) -> None:
    block, inputs = row.make(torch.float64), row.batch(torch.float64)
    called = _Called(row.call, block)
    weights = dict(called.named_parameters())
    moved = [i for i, x in enumerate(inputs) if x.is_floating_point()]

    def call(*leaves: Tensor) -> Tensor:
        given = list(inputs)
        for i, leaf in zip(moved, leaves[: len(moved)], strict=True):
            given[i] = leaf
        return functional_call(called, dict(zip(weights, leaves[len(moved) :], strict=True)), tuple(given))

    leaves = [*(inputs[i] for i in moved), *(w.detach() for w in weights.values())]
    assert torch.autograd.gradcheck(call, [leaf.requires_grad_() for leaf in leaves], fast_mode=True)


class _Called(nn.Module):
    """`row.call` of a block, as the forward of a module."""

    def __init__(self, call: Callable[..., Tensor], block: nn.Module) -> None:
        super().__init__()
        self.call, self.block = call, block

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.block, *inputs)


def test_every_parameter_gets_a_gradient(row: Block) -> None:
    block = row.make()
    passes(row, block, row.batch())
    assert [name for name, p in block.named_parameters() if p.grad is None] == []


def test_bfloat16(row: Block) -> None:
    wanted = row.call(row.make(), *row.batch())
    found = row.call(row.make(torch.bfloat16), *row.batch(torch.bfloat16))
    assert found.dtype is torch.bfloat16
    near(found, wanted, 5e-2)


def test_autocast(row: Block) -> None:
    wanted = row.call(row.make(), *row.batch())
    block = row.make()
    with torch.autocast("cpu", torch.bfloat16):
        found = row.call(block, *row.batch())
    near(found, wanted, 5e-2)
    found.float().sum().backward() if found.requires_grad else None
    assert all(p.grad is None or p.grad.dtype is p.dtype for p in block.parameters())


@pytest.mark.usefixtures("compiler")
def test_compile(row: Block) -> None:
    eager, compiled = row.make(), row.make()
    call = torch.compile(lambda *x: row.call(compiled, *x), fullgraph=True, backend="aot_eager")
    again = Block(row.build, row.inputs, lambda _, *x: call(*x))
    for found, wanted in zip(
        passes(again, compiled, row.batch()), passes(row, eager, row.batch()), strict=True
    ):
        near(found, wanted, 1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own imports
def test_inductor() -> None:
    row = BLOCKS["mlp"]
    block = row.make()
    compiled = torch.compile(block, fullgraph=True)
    near(row.call(compiled, *row.batch()), row.call(block, *row.batch()), 1e-5)


def test_recomputation(row: Block) -> None:
    plain, recomputed = row.make(), row.make()
    again = Block(
        row.build, row.inputs, lambda block, *x: checkpoint(row.call, block, *x, use_reentrant=False)
    )
    for found, wanted in zip(
        passes(again, recomputed, row.batch()), passes(row, plain, row.batch()), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# ── what a block is made of ───────────────────────────────────────────────────────────────────────────────────────


def test_state(row: Block) -> None:
    block = row.make()
    row.call(block, *row.batch())  # running statistics move
    state = {name: value.clone() for name, value in block.state_dict().items()}
    twin = row.build(device="cpu", dtype=torch.float32)
    twin.load_state_dict(state, strict=True)
    same(row, block, twin)
    same(row, block, copy.deepcopy(block))


@pytest.mark.parametrize("assign", [False, True])
def test_meta(row: Block, assign: bool) -> None:
    block = row.make()
    with torch.device("meta"):
        twin = row.build()
    assert all(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    if not assign:
        twin.to_empty(device="cpu")
        for buffer in twin.buffers():
            buffer.fill_(7)  # no storage may be trusted
    twin.load_state_dict(block.state_dict(), strict=True, assign=assign)
    same(row, block, twin)


def test_device_and_dtype(row: Block) -> None:
    far = row.build(device="meta", dtype=torch.float32)
    assert all(tensor.is_meta for tensor in (*far.parameters(), *far.buffers()))
    wide = row.make(torch.float64)
    tensors: list[Any] = [*wide.parameters(), *wide.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} <= {torch.float64}
    assert row.call(wide, *row.batch(torch.float64)).dtype is torch.float64


def same(row: Block, one: nn.Module, other: nn.Module) -> None:
    one, other = copy.deepcopy(one).eval(), copy.deepcopy(other).eval()
    torch.testing.assert_close(row.call(one, *row.batch()), row.call(other, *row.batch()), rtol=0, atol=0)


# ── symmetries ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows(row: Block) -> None:
    block, inputs = row.make().eval(), row.batch()
    wanted = row.call(block, *inputs)
    rows = len(inputs[0])
    order = torch.arange(rows).flip(0)
    near(row.call(block, *(x[order] for x in inputs)), wanted[order], 1e-5)
    near(row.call(block, *(x[:1] for x in inputs)), wanted[:1], 1e-5)


def test_no_rows(row: Block) -> None:
    block, inputs = row.make().eval(), row.batch()
    wanted = row.call(block, *inputs)
    assert row.call(block, *(x[:0] for x in inputs)).shape == (0, *wanted.shape[1:])


def test_tokens(row: Block) -> None:
    if row.tokens is None:
        pytest.skip("positions count")
    block, (x, *others) = row.make().eval(), row.batch()
    order = torch.randperm(x.shape[row.tokens], generator=torch.Generator().manual_seed(0))
    wanted = row.call(block, x, *others).index_select(row.tokens, order)
    near(row.call(block, x.index_select(row.tokens, order), *others), wanted, 1e-5)


def test_causal(row: Block) -> None:
    if row.causal is None:
        pytest.skip("it looks ahead, or has no order")
    block, (x, *others) = row.make().eval(), row.batch()
    length = x.shape[row.causal]
    changed = x.clone()
    changed.narrow(row.causal, length // 2, length - length // 2).neg_()
    found, wanted = row.call(block, changed, *others), row.call(block, x, *others)
    near(found.narrow(row.causal, 0, length // 2), wanted.narrow(row.causal, 0, length // 2), 1e-6)
    later = (found - wanted).narrow(row.causal, length // 2, length - length // 2)
    assert later.abs().max() > 1e-3, "nothing of the input was used"

"""Copies that are kept from save to save, and one thread beside the loop."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from orbit.core import CheckpointError
from orbit.core.checkpoint.background import Background, Staging


def state() -> dict[str, Any]:
    weight = torch.randn(5, 3)
    return {
        "step": 3,
        "model": {"w": weight, "tied": weight, "view": weight[1:4, 2], "t": weight.T},
        "moments": [torch.ones(2, dtype=torch.bfloat16), (torch.empty(0), torch.tensor(7))],
        "parameter": nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "plain": [None, {"a": 1.5}, {2, 3}],
    }


def tensors(staged: dict[str, Any]) -> list[torch.Tensor]:
    return [*staged["model"].values(), staged["moments"][0], *staged["moments"][1], staged["parameter"]]


def test_a_copy_is_equal_and_apart_and_shares_what_was_shared() -> None:
    original = state()
    staged = Staging().copy(original)
    assert staged["plain"] == original["plain"]
    for copy, tensor in zip(tensors(staged), tensors(original), strict=True):
        assert copy.shape == tensor.shape
        assert copy.stride() == tensor.stride()
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
    original["model"]["w"].fill_(0)
    assert staged["model"]["w"].abs().sum() > 0
    storages = {tensor.untyped_storage().data_ptr() for tensor in staged["model"].values()}
    assert len(storages) == 1
    assert torch.equal(staged["sparse"].to_dense(), torch.eye(3))


def test_memory_is_used_again_and_made_anew_where_sizes_differ() -> None:
    staging, original = Staging(), state()

    def places(staged: dict[str, Any]) -> list[int]:
        return [t.untyped_storage().data_ptr() for t in tensors(staged) if t.numel()]

    first = places(staging.copy(original))
    original["model"]["w"].mul_(2)
    second = staging.copy(original)
    assert places(second) == first
    assert torch.equal(second["model"]["view"], original["model"]["view"])
    original["moments"][0] = torch.ones(9)
    third = staging.copy(original)
    assert torch.equal(third["moments"][0], torch.ones(9))
    assert torch.equal(third["parameter"], original["parameter"])
    smaller = staging.copy({"w": torch.ones(15)})
    assert torch.equal(smaller["w"], torch.ones(15))
    assert len(staging._kept) == 1


def test_what_is_not_plain_is_refused_in_the_loop() -> None:
    with pytest.raises(CheckpointError, match=r"\['a'\] is a builtins.object"):
        Staging().copy({"a": object()})


def test_one_at_a_time_and_errors_come_out_once() -> None:
    background, gate, order = Background(), threading.Event(), []
    background.wait()
    background.submit(lambda: (gate.wait(10), order.append("first")))
    background.check()
    assert order == []
    threading.Timer(0.05, gate.set).start()
    background.submit(lambda: order.append("second"))
    assert order[0] == "first", "it waited"
    background.wait()
    assert order == ["first", "second"]

    def fail() -> None:
        raise CheckpointError("full")

    background.submit(fail)
    with pytest.raises(CheckpointError, match="full"):
        background.wait()
    background.wait()
    background.submit(fail)
    assert background._thread is not None
    background._thread.join()
    with pytest.raises(CheckpointError, match="full"):
        background.check()
    background.submit(fail)
    with pytest.raises(CheckpointError, match="full"):
        background.submit(lambda: order.append("third"))
    assert "third" not in order


@pytest.mark.gpu
def test_from_a_gpu_it_comes_by_pinned_memory() -> None:
    staging = Staging()
    original = {"w": torch.randn(1000, 1000, device="cuda"), "c": torch.ones(3)}
    for _ in range(2):
        original["w"].mul_(3)
        staged = staging.copy(original)
        assert staged["w"].is_pinned()
        assert staged["w"].device.type == "cpu"
        assert torch.equal(staged["w"], original["w"].cpu())

"""Blocks before the first expert run once a forward, and nobody can tell but by the clock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from orbit.adapter.errors import RouteError
from orbit.xlora.passes.shared import Shared, leading_blocks
from tests.xlora.oracle import llama, mixture, tokens

EXPERTS = {
    "facts": {"targets": ["layers.2.*proj", "layers.3.*proj"]},
    "chat": {"targets": ["layers.3.*proj"]},
}


def late(**options: Any) -> Any:
    """A mixture whose first two blocks of four carry no expert."""
    return mixture(llama(num_hidden_layers=4, **options), EXPERTS)


@contextmanager
def runs(model: Any) -> Iterator[list[int]]:
    """How often each block's attention has run."""
    counts = [0] * len(model.model.layers)
    before = [layer.self_attn.forward for layer in model.model.layers]

    def counted(index: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts[index] += 1
            return forward(*args, **kwargs)

        return run

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.forward = counted(index, before[index])
    yield counts
    for layer in model.model.layers:
        del layer.self_attn.forward


def step(model: Any) -> tuple[Tensor, list[Tensor | None]]:
    output = model(input_ids=tokens(), labels=tokens(), use_cache=False)
    output.loss.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return output.logits.detach(), grads


def unshared(model: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The same with a hook on the embeddings, which keeps blocks from being shared."""
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: None)
    found = step(model)
    handle.remove()
    return found


@pytest.mark.parametrize("train", [False, True])
def test_leading_blocks_run_once_and_every_bit_is_the_same(train: bool) -> None:
    model = late().train(train)
    with runs(model) as counts:
        logits, grads = step(model)
    assert counts == [1, 1, 2, 2]
    with runs(model) as counts:
        expected, wanted = unshared(model)
    assert counts == [2, 2, 2, 2]
    assert torch.equal(logits, expected)
    assert [g is None for g in grads] == [g is None for g in wanted]
    assert all(
        torch.equal(g, w) for g, w in zip(grads, wanted, strict=True) if g is not None and w is not None
    )
    assert all("forward" not in vars(block) for block in model.model.layers)


def test_an_exception_in_either_pass_leaves_no_trace() -> None:
    model = late()
    for fail_at in (1, 2):  # the last block runs in both passes
        calls = []

        def failing(*args: Any, calls: list[int] = calls, fail_at: int = fail_at) -> None:
            calls.append(1)
            if len(calls) == fail_at:
                raise ValueError("stop")

        handle = model.model.layers[3].mlp.register_forward_pre_hook(failing)
        with pytest.raises(ValueError, match="stop"):
            model(tokens(), use_cache=False)
        handle.remove()
        assert all("forward" not in vars(block) for block in model.model.layers)


def test_a_forward_on_the_instance_is_run_and_put_back() -> None:
    model = late()
    expected = model(tokens(), use_cache=False).logits
    block = model.model.layers[0]
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:  # as accelerate's hooks are
        calls.append(1)
        return type(block).forward(block, *args, **kwargs)

    block.forward = forward
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert calls == [1]
    assert block.forward is forward


def test_blocks_run_twice_where_somebody_could_tell() -> None:
    model = late().train()
    assert leading_blocks(model) == list(model.model.layers[:2])
    model.model.layers[1].self_attn.attention_dropout = 0.1
    assert leading_blocks(model) == []
    model.eval()
    assert len(leading_blocks(model)) == 2
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    assert leading_blocks(model) == list(model.model.layers[:1])
    with torch.no_grad():
        assert len(leading_blocks(model)) == 2
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert leading_blocks(model) == []
    handle.remove()
    assert (
        leading_blocks(mixture(llama(), {"facts": {"targets": ["embed_tokens", "layers.1.mlp.up_proj"]}}))
        == []
    )
    with runs(model) as counts:
        model(tokens(), use_cache=False, output_hidden_states=True)
        model(tokens(), use_cache=True)
    assert counts[0] == counts[3]


def test_inputs_that_ask_for_a_gradient_get_theirs() -> None:
    model = late()
    embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_(True)
    model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_an_output_that_was_written_to_is_made_anew() -> None:
    shared, calls = Shared(), []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        return x + 1

    once = shared.around(block)
    x = torch.zeros(2)
    kept, changed = once(x), once(x)
    changed.mul_(5)
    shared.replaying = True
    assert once(x) is kept
    assert torch.equal(once(x), torch.ones(2))
    assert torch.equal(once(x), torch.ones(2))  # more calls than before
    assert len(calls) == 4


def test_an_output_that_is_written_to_in_inference_mode_is_made_anew() -> None:
    """Nothing tells there that a tensor was written to."""
    model = late()
    model.model.layers[2].register_forward_pre_hook(lambda block, args: (args[0].mul_(1.5), *args[1:]))
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
    with torch.inference_mode():
        assert torch.equal(model(tokens(), use_cache=False).logits, expected)


def test_another_thread_comes_to_no_shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before it sees them, while one thread is at its passes."""
    from orbit.xlora.passes import forward

    model, here, refused = late(), [], []
    expected = model(tokens(), use_cache=False).logits

    def elsewhere() -> None:
        with pytest.raises(RouteError, match="one route at a time"):
            model(tokens(), use_cache=False)
        refused.append(True)

    def between(*args: Any) -> Tensor:
        here.append(threading.get_ident())
        if len(here) == 1:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return predict(*args)

    predict = forward.predict
    monkeypatch.setattr(forward, "predict", between)
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert refused
    assert here == [threading.get_ident()]
    assert not any("forward" in vars(block) for block in model.model.layers)

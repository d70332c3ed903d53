"""The scaling pass of a text is run once: the second epoch runs none, and is the same to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from orbit.xlora import XLoRAError, remember
from orbit.xlora.passes import forward
from orbit.xlora.passes.memory import _keys
from tests.xlora.oracle import llama, mixture, tokens


@pytest.fixture
def passes_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every scaling pass."""
    run, calls = forward.scaling_pass, []

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return run(*args)

    monkeypatch.setattr(forward, "scaling_pass", counted)
    return calls


def epochs(model: Any, count: int) -> list[float]:
    """Losses of a classifier trained on three batches, in another order in each epoch."""
    optimizer = torch.optim.AdamW(model.xlora_classifier.parameters(), lr=1e-2)
    batches = list(tokens(6).split(2))
    losses = []
    for epoch in range(count):
        for k in range(3):
            batch = batches[(k + epoch) % 3]
            loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_the_second_epoch_runs_no_scaling_pass_and_has_the_same_losses(passes_run: list[int]) -> None:
    expected = epochs(mixture(xlora_dropout_p=0.0).train(), 3)
    assert len(passes_run) == 9
    passes_run.clear()
    model = mixture(xlora_dropout_p=0.0).train()
    with remember(model) as memory:
        losses = epochs(model, 3)
    assert losses == expected
    assert len(passes_run) == 3
    assert (memory.hits, memory.misses) == (6, 3)
    assert model.xlora_memory is None


def test_rows_are_found_in_other_batches_by_all_that_they_hold() -> None:
    model, ids = mixture(), tokens(4)
    mask = torch.ones_like(ids)
    other = mask.clone()
    other[:, 0] = 0
    with torch.no_grad(), remember(model) as memory:
        model(ids, attention_mask=mask, use_cache=False)
        model(ids[[2, 0]], attention_mask=mask[:2], use_cache=False)
        assert memory.hits == 1
        model(ids, attention_mask=other, use_cache=False)
        model(ids, use_cache=False)
        model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=False)
        model(ids, attention_mask=mask, position_ids=torch.arange(9)[None] + 1, use_cache=False)
        assert memory.hits == 1
        model(ids, attention_mask=mask, position_ids=torch.arange(9)[None] + 1, use_cache=False)
        assert memory.hits == 2
        misses = memory.misses
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)  # never kept
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)
        assert memory.misses == misses + 2
        model(ids, attention_mask=mask, use_cache=True)  # with a cache, it does not ask
        assert memory.misses == misses + 2


def test_positions_of_images_are_not_rows() -> None:
    ids = tokens(3, 4)
    assert len(_keys({"input_ids": ids, "position_ids": torch.arange(4)[None]}, False)) == 3
    for batch in (ids, ids[:2]):
        positions = torch.zeros(3, len(batch), 4, dtype=torch.long)
        assert _keys({"input_ids": batch, "position_ids": positions}, False) == []


def test_the_least_recently_used_goes_first() -> None:
    model, ids = mixture(), tokens(3)
    row = 9 * 32 * 4
    with torch.no_grad(), remember(model, max_bytes=2 * row) as memory:
        for k in (0, 1, 0, 2):  # 2 takes the place of 1
            model(ids[k : k + 1], use_cache=False)
        assert (memory.hits, memory.n_bytes) == (1, 2 * row)
        model(ids[:1], use_cache=False)
        assert memory.hits == 2
        model(ids[1:2], use_cache=False)
        assert memory.hits == 2
    with torch.no_grad(), remember(model, max_bytes=row - 1) as memory:
        model(ids[:1], use_cache=False)
        assert memory.n_bytes == 0


def test_new_weights_of_the_base_are_noticed() -> None:
    model, ids = mixture(), tokens()
    with torch.no_grad(), remember(model) as memory:
        model(ids, use_cache=False)
        model.xlora_classifier.layers[0].weight.add_(1)
        model(ids, use_cache=False)
        assert memory.hits == 1
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
        changed = model(ids, use_cache=False).logits
        assert memory.hits == 1
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, use_cache=False)
        assert memory.hits == 1
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, changed)


def test_what_is_not_the_same_every_time_is_refused() -> None:
    model = mixture(llama(attention_dropout=0.1)).train()
    with (
        pytest.raises(XLoRAError, match=r"a LlamaAttention with attention_dropout=0\.1 is in train mode"),
        remember(model),
    ):
        pass
    with remember(model.eval()):
        model(tokens(), use_cache=False)
        model.train()
        with pytest.raises(XLoRAError, match="the base drops at random"):
            model(tokens(), use_cache=False)
        model.eval()
        model.set_scaling_pass_value(0.5)
        with pytest.raises(XLoRAError, match=r"scaling_pass_value=0\.5"):
            model(tokens(), use_cache=False)
        model.set_scaling_pass_value(0)
        model.model.norm.weight.requires_grad_(True)
        with pytest.raises(XLoRAError, match=r"norm\.weight trains"):
            model(tokens(), use_cache=False)
    for size in (0, True, 1.5):
        with pytest.raises(XLoRAError, match="max_bytes"), remember(mixture(), size):  # type: ignore[arg-type]
            pass


def test_noise_of_train_mode_is_not_remembered() -> None:
    model, ids = mixture().eval(), tokens()

    def noisy(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + torch.randn_like(output) if module.training else output

    model.get_input_embeddings().register_forward_hook(noisy)  # as NEFTune does
    with torch.no_grad(), remember(model) as memory:
        model(ids, use_cache=False)
        model.train()
        for _ in range(2):
            with pytest.raises(XLoRAError, match="draws random numbers"):
                model(ids, use_cache=False)
        model.eval()
        model(ids, use_cache=False)
        assert memory.hits == 1


def test_experts_may_train_and_drop() -> None:
    model = mixture(experts={"a": {"dropout": 0.5}, "b": {}}, use_trainable_adapters=True).train()
    with remember(model) as memory:
        model(tokens(), use_cache=False)
        model(tokens(), use_cache=False)
    assert memory.hits == 1


def test_a_copy_remembers_nothing() -> None:
    model = mixture()
    with remember(model):
        assert copy.deepcopy(model).xlora_memory is None

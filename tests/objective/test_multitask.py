"""MultiTask against CausalLM under each task by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orbit import adapter
from orbit.objective import CausalLM
from orbit.objective.multitask import MultiTask
from tests.tiny_llm import tiny_llama, tiny_tokenizer

TASKS = ["a", "b", "a"]


@pytest.fixture
def model() -> nn.Module:
    model = tiny_llama(tiny_tokenizer())
    torch.manual_seed(5)
    for task in ("a", "b", "c"):
        adapter.inject(model, adapter.AdapterConfig(r=2), task)
        for parameter in adapter.adapter_parameters(model, task).values():
            nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.fixture
def batch() -> dict:
    ids = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3], labels[0, 5:] = -100, -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "task": TASKS,
        "index": ids[:, 0],
    }


def of_task(model: nn.Module, batch: dict, task: str):
    rows = [row for row, name in enumerate(TASKS) if name == task]
    with adapter.route(model, task):
        return CausalLM()(model, {key: batch[key][rows] for key in ("input_ids", "attention_mask", "labels")})


def test_the_loss_is_the_mean_over_tokens_and_each_task_is_recorded(model, batch) -> None:
    outcome = MultiTask()(model, batch)
    parts = {task: of_task(model, batch, task) for task in ("a", "b")}
    assert outcome.weight == sum(part.weight for part in parts.values()) == 10
    wanted = sum(part.loss * part.weight for part in parts.values()) / 10
    torch.testing.assert_close(outcome.loss, wanted)
    assert set(outcome.records["task_loss"]) == {"a", "b"}
    for task, part in parts.items():
        torch.testing.assert_close(outcome.records["task_loss"][task], part.loss.detach())


def test_with_optimizers_each_task_has_its_own_gradient(model, batch) -> None:
    optimizers = adapter.TaskOptimizers(
        {
            task: torch.optim.SGD(adapter.adapter_parameters(model, task).values(), lr=1.0)
            for task in ("a", "b", "c")
        }
    )
    before = {name: p.detach().clone() for name, p in adapter.adapter_parameters(model).items()}
    MultiTask(optimizers=optimizers)(model, batch).loss.backward()
    optimizers.step()
    assert optimizers.stepped == ("a", "b")
    moved = {name: before[name] - p.detach() for name, p in adapter.adapter_parameters(model).items()}
    with torch.no_grad():
        for name, p in adapter.adapter_parameters(model).items():
            p.copy_(before[name])
    optimizers.zero_grad()
    for task in ("a", "b"):
        of_task(model, batch, task).loss.backward()
        for name, p in adapter.adapter_parameters(model, task).items():
            assert (moved[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name  # the norms are of fp32
    assert not any(moved[name].any() for name in adapter.adapter_parameters(model, "c"))


@pytest.mark.parametrize("key", ["labels", "task"])
def test_a_batch_that_lacks_something_is_named(key, model, batch) -> None:
    del batch[key]
    with pytest.raises(ValueError, match=f"MultiTask needs '{key}'"):
        MultiTask()(model, batch)


def test_a_batch_with_nothing_supervised_weighs_nothing(model, batch) -> None:
    batch["labels"].fill_(-100)
    outcome = MultiTask()(model, batch)
    assert (outcome.loss.item(), outcome.weight.item()) == (0.0, 0)

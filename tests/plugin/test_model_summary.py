from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from orbit import adapter
from orbit.engine import Engine
from orbit.plugin import LoRA, ModelSummary
from orbit.plugin.model_summary import Summary, summarise
from tests import tiny
from tests.tiny_llm import tiny_llama, tiny_tokenizer


def table(summary: Summary) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(summary.table())
    return out.getvalue()


def run(model: nn.Module, *plugins: Any, data: Any = None, **options: Any) -> Engine:
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu", **options
    )
    engine.run(tiny.loader() if data is None else data)
    return engine


def test_counts_shares_sizes_and_dtypes() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3).half())
    model[0].requires_grad_(False)
    model[1].running_mean.data = model[1].running_mean.data.double()
    rows = {row.name: row for row in summarise(model).rows}
    assert [(row.parameters, row.trainable) for row in rows.values()] == [
        (227, 83),
        (144, 0),
        (32, 32),
        (51, 51),
    ]
    assert rows["0"].size == 144 * 4
    assert (
        rows["1"].size == 32 * 4 + 16 * 8 + 16 * 4 + 8
    )  # with running mean, variance and the batches' number
    assert rows[""].size == sum(rows[name].size for name in "012")
    assert rows["2"].dtypes == ("float16",)
    assert rows[""].dtypes == ("float16", "float32")
    text = table(summarise(model))
    assert "227 parameters, 83 of them train and 144 are frozen" in text
    assert "36.56 %" in text


def test_shared_parameters_count_once() -> None:
    llama = tiny_llama(tiny_tokenizer())
    llama.lm_head.weight = llama.model.embed_tokens.weight
    rows = {row.name: row for row in summarise(llama).rows}
    assert rows[""].parameters == sum(p.numel() for p in llama.parameters())
    assert rows["model"].parameters == rows[""].parameters
    assert rows["lm_head"].parameters == rows["lm_head"].size == 0
    assert rows["lm_head"].tied == ("model.embed_tokens.weight",)
    assert rows["model"].tied == ()
    assert "Linear (shares model.embed_tokens.weight)" in table(summarise(llama))


@pytest.mark.parametrize(("depth", "names"), [(0, 1), (1, 3), (2, 7), (-1, 33)])
def test_depth(depth: int, names: int) -> None:
    llama = tiny_llama(tiny_tokenizer())
    rows = summarise(llama, depth).rows
    assert len(rows) == names
    if depth == -1:
        assert [row.name for row in rows] == [name for name, _ in llama.named_modules()]


def test_shapes_are_those_of_the_first_batch_and_no_forward_is_added() -> None:
    calls = []
    model = tiny.model()
    model.register_forward_hook(lambda *_: calls.append(0))
    plugin = ModelSummary(console=Console(file=(out := io.StringIO()), width=200))
    run(model, plugin)
    assert len(calls) == 7
    assert plugin.summary is not None
    shapes = [(row.input, row.output) for row in plugin.summary.rows]
    assert shapes == [("8×8", "8×3"), ("8×8", "8×16"), *[("8×16", "8×16")] * 3, ("8×16", "8×3")]
    assert out.getvalue() == table(plugin.summary)  # once
    assert len(model._forward_hooks) == 1
    assert all(not module._forward_hooks for module in list(model.modules())[1:])


def test_a_module_that_is_called_twice_shows_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x)[:, None])[:, 0, :3]

    plugin = ModelSummary()
    run(Twice(), plugin)
    assert plugin.summary is not None
    assert [row.input for row in plugin.summary.rows] == ["8×8", "8×8"]


def test_keyword_arguments_and_model_outputs() -> None:
    tokens = torch.arange(10).reshape(2, 5) % 7
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    plugin = ModelSummary(1)
    llama = tiny_llama(tokenizer := tiny_tokenizer())
    run(llama, plugin, data=[batch])
    assert plugin.summary is not None
    rows = {row.name: row for row in plugin.summary.rows}
    assert rows[""].input == "2×5, 2×5, 2×5"
    assert rows[""].output.startswith(f"(), 2×5×{len(tokenizer)}")
    assert rows["lm_head"].output == f"2×5×{len(tokenizer)}"


def test_adapters_are_listed_by_task() -> None:
    model = tiny.model()
    plugin = ModelSummary(-1)
    run(model, LoRA(target_names=["0", "4"], r=2, alpha=4), plugin)
    assert plugin.summary is not None
    assert [row.name for row in plugin.summary.rows] == ["", "0", "1", "2", "3", "4"]
    (task,) = plugin.summary.tasks
    expected = 2 * (8 + 16) + 2 * (16 + 3)
    assert (task.parameters, task.trainable) == (expected, expected)
    assert task.kind == "adapter of 2 layers, r=2"
    assert plugin.summary.total.trainable == expected
    adapter.inject(model, adapter.AdapterConfig(targets=["4"], r=3), name="second")
    assert [row.parameters for row in summarise(model).tasks] == [expected, 3 * (16 + 3)]
    assert "task 'second'" in table(summarise(model))


def test_a_compiled_model_is_summarised_without_shapes() -> None:
    model = tiny.model()
    compiled: Any = torch.compile(model, backend="eager")
    plugin = ModelSummary()
    run(compiled, plugin)
    assert plugin.summary is not None
    assert plugin.summary.total.parameters == sum(p.numel() for p in model.parameters())
    assert all(row.input == row.output == "" for row in plugin.summary.rows)


def test_hooks_go_when_the_first_batch_fails_or_evaluates() -> None:
    model = tiny.model()
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[ModelSummary()], device="cpu"
    )
    with pytest.raises(KeyError), engine:
        for _ in engine.train(tiny.loader()):
            assert all(module._forward_hooks for module in model.modules())
            for _ in engine.eval(tiny.loader()):
                assert not any(module._forward_hooks for module in model.modules())
            raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"ModelSummary\(max_depth=-2\)"):
        ModelSummary(-2)

from __future__ import annotations

import io
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from orbit.core.measuring.memory import Saved, optimizer_size
from orbit.core.nested import map_nested_tensor
from orbit.engine import Engine
from orbit.plugin import LoRA, MemoryEstimator, Plugin
from tests import tiny
from tests.tiny_llm import tiny_llama, tiny_tokenizer


class Peak(Plugin):
    """What the allocator had given out at most in one step, beyond what was there before it."""

    priority = -1

    def __init__(self, step: int) -> None:
        self.step, self.bytes = step, 0

    def on_before_step(self, trainer: Any) -> None:
        if trainer.step == self.step - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            self.profile.__exit__(None, None, None)
            events = self.profile.profiler.kineto_results.events()
            sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
            self.bytes = max(accumulate(size for _, size in sizes))


def mlp() -> Any:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, [(torch.randn(n, 64), torch.randint(10, (n,))) for n in (256, 256, 256, 256)]


def wide() -> Any:
    """Few samples: the optimizer's step is the peak."""
    model, _ = mlp()
    return model, [(torch.randn(4, 64), torch.randint(10, (4,))) for _ in range(4)]


def convolutions() -> Any:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16 * 16, 10),
    )  # fmt: skip
    return model, [(torch.randn(16, 3, 16, 16), torch.randint(10, (16,))) for _ in range(4)]


def llama() -> Any:
    model = tiny_llama(tiny_tokenizer(), hidden=64)
    tokens = torch.randint(10, (8, 96))
    return model, [{"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}] * 4


def lora() -> Any:
    return llama()


MODELS = {"mlp": mlp, "wide": wide, "convolutions": convolutions, "llama": llama, "lora": lora}


def run(model: nn.Module, data: Any, *plugins: Plugin, accumulation: int = 1) -> Engine:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = Engine(
        model, optimizer, nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu",
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    engine.run(data)
    return engine


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_is_the_allocators_peak_within_a_tenth(name: str, accumulation: int) -> None:
    model, data = MODELS[name]()
    plugin, peak = MemoryEstimator(verbose=False), Peak(2)
    adapters = [LoRA(target_names=["q_proj", "v_proj"], r=2)] if name == "lora" else []
    run(model, data, *adapters, plugin, peak, accumulation=accumulation)
    memory = plugin.memory
    assert memory is not None
    true = memory.fixed + memory.batch + peak.bytes  # what was there, and what the step added
    assert memory.peak / true == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["mlp", "convolutions", "llama"])
def test_the_suggested_batch_fits_and_a_much_larger_one_does_not(name: str) -> None:
    """The limit is met by the allocator's true peak within a tenth."""
    model, data = MODELS[name]()
    plugin = MemoryEstimator(verbose=False)
    run(model, data, plugin)
    assert plugin.memory is not None
    limit = plugin.memory.fixed + 5 * (plugin.memory.peak - plugin.memory.fixed)
    best = plugin.suggest_batch(limit)
    assert 4 * plugin.memory.samples < best < 6 * plugin.memory.samples

    def grown(value: Any) -> Any:
        times = -(-best // len(value))
        return value.repeat(times, *[1] * (value.ndim - 1))[:best]

    peak, large = Peak(2), MemoryEstimator(verbose=False)
    run(MODELS[name]()[0], [map_nested_tensor(grown, data[0])] * 2, large, peak)
    assert large.memory is not None
    assert large.memory.samples == best
    true = large.memory.fixed + large.memory.batch + peak.bytes
    assert 0.85 * limit < true < 1.1 * limit


@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_nothing_changes_a_bit_also_when_a_batch_is_suggested(face: str) -> None:
    """Dropout, batch norm and a shuffled loader: neither the measuring nor the forward of its own leave a trace."""

    class Ask(Plugin):
        def __init__(self, estimator: MemoryEstimator) -> None:
            self.estimator, self.answers = estimator, []
            self.batch = next(iter(tiny.loader()))

        def on_after_step(self, trainer: Any) -> None:
            self.answers.append(self.estimator.suggest_batch(10**7))
            self.answers.append(self.estimator.suggest_batch(10**7, batch=self.batch))

    def weights(plugins: list[Plugin]) -> nn.Module:
        torch.manual_seed(0)
        if face == "trainer":
            trainer = tiny.Trainer(max_steps=10, plugins=plugins)
            trainer.train()
            return trainer.model
        return run(tiny.model(), tiny.loader(), *plugins).model

    estimator = MemoryEstimator(verbose=False)
    ask = Ask(estimator)
    assert tiny.same(weights([estimator, ask]), weights([]))
    assert len(set(ask.answers)) == 1
    assert ask.answers[0] > 8


def test_before_training_a_given_batch_is_measured() -> None:
    model, data = mlp()
    plugin = MemoryEstimator(verbose=False)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")
    with pytest.raises(RuntimeError, match=r"call trainer.build\(\) first"):
        plugin.suggest_batch(10**7, batch=data[0])
    engine.build()
    with pytest.raises(RuntimeError, match="nothing is measured yet"):
        plugin.suggest_batch(10**7)
    before = plugin.suggest_batch(10**7, batch=data[0])
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    engine.run(data)
    assert plugin.suggest_batch(10**7) == before
    assert plugin.suggest_batch(10**6) == 0  # parameters, moments and gradients alone are more
    assert plugin.suggest_batch() > before
    assert plugin.suggest_batch(headroom=0.5) < plugin.suggest_batch()


def test_one_sample_and_batch_normalisation() -> None:
    """No half can be computed: all of the activations count as growing."""
    model, data = mlp()
    plugin = MemoryEstimator(verbose=False)
    run(model, [(data[0][0][:1], data[0][1][:1])] * 2, plugin)
    assert plugin.memory is not None
    each = plugin.memory.activations + plugin.memory.backward + plugin.memory.batch
    assert plugin.suggest_batch(10**7) == (10**7 - plugin.memory.fixed) // each
    norm = MemoryEstimator(verbose=False)
    run(tiny.model(), tiny.loader(batch_size=2), norm)
    assert norm.suggest_batch(10**6) > 0


def test_what_does_not_grow_with_the_batch_is_not_taken_to() -> None:
    """Under autocast the backward keeps the weights in half precision, whatever the batch."""

    def measured(rows: int) -> MemoryEstimator:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        plugin = MemoryEstimator(verbose=False)
        engine = Engine(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss(), plugins=[plugin],
            device="cpu", mixed_precision="bf16",
        )  # fmt: skip
        engine.run([(torch.randn(rows, 512), torch.randint(10, (rows,)))] * 2)
        model.eval()
        return plugin

    few = measured(8)
    assert few.memory is not None
    limit = few.memory.fixed + 5 * 2**20
    rows = few.suggest_batch(limit)
    assert not few._trainer.model.training  # the forward of its own has put it back
    many = measured(rows)
    assert many.memory is not None
    assert many.memory.peak == pytest.approx(limit, rel=0.01)


def test_adapters_have_few_gradients_and_checkpointing_keeps_less() -> None:
    plugins = [MemoryEstimator(verbose=False) for _ in range(3)]
    model, data = llama()
    run(model, data, plugins[0])
    run(*llama(), LoRA(target_names=["q_proj"], r=2), plugins[1])
    model, data = llama()
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    run(model, data, plugins[2])
    full, adapted, checkpointed = (plugin.memory for plugin in plugins)
    assert full is not None
    assert adapted is not None
    assert checkpointed is not None
    trainable = 2 * 2 * (64 + 64) * 4  # two layers, r = 2, float32
    assert adapted.gradients == trainable
    assert adapted.optimizer == pytest.approx(2 * trainable, rel=0.02)
    assert full.gradients == full.parameters
    assert checkpointed.activations < 0.5 * full.activations
    assert checkpointed.gradients == full.gradients


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        torch.optim.SGD,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        torch.optim.Adagrad,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
    ],
)
def test_the_optimizers_state_is_known_before_its_first_step(make: Any) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 10).bfloat16())
    model[0].bias.requires_grad_(False)
    optimizer = make(list(model.parameters()))
    before = optimizer_size(optimizer)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert before == optimizer_size(optimizer)
    assert before is not None
    assert groups == [[id(p) for p in group["params"]] for group in optimizer.param_groups]


def test_an_optimizer_that_needs_storage_is_asked_after_its_first_step() -> None:
    model, data = mlp()
    plugin = MemoryEstimator(verbose=False)
    engine = Engine(
        model,
        torch.optim.Adafactor(model.parameters()),
        nn.CrossEntropyLoss(),
        plugins=[plugin],
        device="cpu",
    )
    engine.build()
    with pytest.raises(ValueError, match="state of Adafactor cannot be told before its first step"):
        plugin.suggest_batch(10**7, batch=data[0])
    engine.run(data)
    assert plugin.memory is not None
    assert 0 < plugin.memory.optimizer < plugin.memory.parameters
    assert plugin.suggest_batch(10**7) > 0


def test_the_report_is_printed_once_after_two_steps() -> None:
    out = io.StringIO()
    plugin = MemoryEstimator(console=Console(file=out, width=80))
    with pytest.raises(RuntimeError, match="nothing is measured"):
        _ = plugin.report
    model, data = mlp()
    engine = Engine(
        model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu"
    )
    printed = []
    for _ in engine.train(data, num_epochs=2):
        engine.auto_update()
        printed.append(len(out.getvalue()))
    assert printed[0] == printed[1] == 0
    assert printed[2] == printed[-1] > 0
    assert "activations (256 samples)" in out.getvalue()
    assert "peak, estimated" in out.getvalue()
    assert plugin.memory is not None
    assert f"{plugin.memory.peak / 2**20:,.2f}" in out.getvalue()


def test_hooks_go_when_the_first_batch_fails() -> None:
    model, data = mlp()
    plugin = MemoryEstimator(verbose=False)
    engine = Engine(
        model, torch.optim.AdamW(model.parameters()), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu"
    )
    with pytest.raises(KeyError), engine:
        for _ in engine.train(data):
            saved = plugin._saved
            raise KeyError
    assert saved is not None
    torch.ones(1000, requires_grad=True).exp()
    assert saved.bytes == 0
    engine.run(data)
    assert plugin.memory is not None


def test_a_batch_that_needs_several_forwards_counts_what_lives_at_once() -> None:
    """Two forwards with a backward each keep what one keeps; two before one backward keep both."""
    x, model = torch.randn(50, 64), mlp()[0]

    def counted(apart: bool) -> int:
        with Saved([x]) as saved:
            first = model(x).sum()
            if apart:
                first.backward()
            (model(x).sum() + (0 if apart else first)).backward()
        return saved.bytes

    assert counted(apart=False) == 2 * counted(apart=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"limit": 0}, "limit=0"), ({"headroom": 1.0}, "headroom=1.0"), ({"headroom": -0.1}, "headroom=-0.1")],
)
def test_bad_arguments(options: dict[str, Any], error: str) -> None:
    plugin = MemoryEstimator(verbose=False)
    run(*mlp(), plugin)
    with pytest.raises(ValueError, match=error):
        plugin.suggest_batch(**options)
    with pytest.raises(ValueError, match=r"MemoryEstimator\(interval=0\)"):
        MemoryEstimator(interval=0)


@pytest.mark.gpu
def test_on_cuda_the_peak_is_measured_and_logged() -> None:
    seen: list[Any] = []

    class Log(Plugin):
        def on_log(self, trainer: Any, records: dict[str, Any], dry_run: bool) -> None:
            seen.append(records["memory"])

    model = nn.Sequential(
        nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.GELU(), nn.Linear(512, 10)
    )
    data = [(torch.randn(4096, 512), torch.randint(10, (4096,)))] * 4
    plugin = MemoryEstimator(interval=2, verbose=False)
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters()),
        nn.CrossEntropyLoss(),
        plugins=[plugin, Log()],
        device="cuda",
    )
    engine.run(data)
    assert plugin.memory is not None
    assert plugin.measured_peak is not None
    assert plugin.memory.peak / plugin.measured_peak == pytest.approx(1, abs=0.25)
    assert len(seen) == 2
    assert 0 < seen[1]["allocated"] < seen[1]["peak"] <= seen[1]["reserved"]
    assert plugin.suggest_batch() > 4096

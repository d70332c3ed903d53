"""Throughput counts what a real step does, changes no bit of it, and times training alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes
from torch.utils.flop_counter import FlopCounterMode

from orbit.core.measuring.peak import peak_of
from orbit.engine import Engine
from orbit.plugin import Throughput
from tests import tiny


class Clock:
    """Time goes by when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("orbit.plugin.throughput.perf_counter", clock)
    return clock


class TinyLM(nn.Module):
    """Attention and dropout; returns its loss as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def token_batch(rows: int = 4, length: int = 8, padding: int = 3) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length - padding :] = 0
    ids = torch.arange(rows * length).reshape(rows, length) % 11
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def train(
    model: nn.Module,
    batches: list[Any],
    plugins: list[Any],
    each: Callable[..., Any] | None = None,
    **options: Any,
):
    torch.manual_seed(7)
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=plugins, device="cpu", **options
    )
    for _ in engine.train(batches):
        engine.auto_update()
        if each is not None:
            each(engine)
    return engine


def counted(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_flops_are_those_of_one_forward_and_backward(clock: Clock, checkpointed: bool) -> None:
    """With activation checkpointing too: what is computed twice counts once."""

    def pass_time(engine: Engine) -> None:
        clock.now += 2.0

    plugin = Throughput(interval=2, peak=1e6)
    engine = train(TinyLM(), [token_batch()] * 4, [plugin], pass_time, activation_checkpointing=checkpointed)
    flops = counted(TinyLM(), token_batch())
    assert flops > 0
    assert plugin.figures == pytest.approx(
        {
            "samples_per_second": 2.0,
            "tokens_per_second": 14.5,
            "tflops": flops / 2.0 / 1e12,
            "mfu": flops / 2.0 / 1e6,
        }
    )
    assert engine.step_info.items() >= plugin.figures.items()
    assert str(plugin) == f"2.0 samples/s, 14 tokens/s, {flops / 2e12:.4g} TFLOP/s, MFU {flops / 2e6:.1%}"


def test_it_changes_no_bit_and_leaves_no_mode_behind() -> None:
    plain, watched = TinyLM(), TinyLM()
    batches = [token_batch(), token_batch(3, 5), token_batch(2, 20)]
    train(plain, batches, [])
    train(watched, batches, [Throughput(1)])
    assert tiny.same(plain, watched)
    engine = Engine(plain, tiny.optimizer(plain), plugins=[Throughput(1)], device="cpu")
    for _ in engine.train(batches):
        assert len(dispatch_modes()) == 1, "the first batch is watched"
        break
    assert len(dispatch_modes()) == 0


def test_each_row_length_is_counted_once_and_batches_of_it_are_scaled(clock: Clock) -> None:
    def pass_time(engine: Engine) -> None:
        clock.now += 1.0

    plugin = Throughput(interval=1)
    seen: list[float] = []
    batches = [
        token_batch(4, 8),
        token_batch(2, 8),
        token_batch(2, 32),
        token_batch(4, 32),
        token_batch(6, 8),
    ]
    watching = []

    def look(engine: Engine) -> None:
        pass_time(engine)
        seen.append(plugin.figures.get("tflops", 0.0) * 1e12)

    class Peek(Throughput):
        def on_before_batch(self, trainer: Any) -> None:
            super().on_before_batch(trainer)
            watching.append(len(dispatch_modes()))

    plugin = Peek(interval=1)
    engine = train(TinyLM(), batches, [plugin], look)
    seen.append(engine.step_info["tflops"] * 1e12)
    assert watching == [1, 0, 1, 0, 0]
    exact = [counted(TinyLM(), batch) for batch in batches]
    assert seen[2:] == pytest.approx(exact[1:], rel=1e-6)


def test_evaluation_is_not_timed_and_not_counted(clock: Clock) -> None:
    def body(engine: Engine) -> None:
        clock.now += 1.0
        for _ in engine.eval([token_batch()] * 3):
            for _ in engine.eval([token_batch()]):
                clock.now += 50.0
            clock.now += 100.0

    plugin = Throughput(interval=2)
    train(TinyLM(), [token_batch()] * 3, [plugin], body)
    assert plugin.figures["samples_per_second"] == pytest.approx(4.0)
    assert plugin.figures["tflops"] == pytest.approx(counted(TinyLM(), token_batch()) / 1e12)


def test_what_counts_as_a_token_and_as_flops_can_be_said(clock: Clock) -> None:
    def pass_time(engine: Engine) -> None:
        clock.now += 1.0

    plugin = Throughput(1, tokens=lambda batch: batch[0].numel(), flops=lambda batch: 5e12)
    train(tiny.model(), list(tiny.loader(24)), [plugin], pass_time)
    assert plugin.figures == pytest.approx({"samples_per_second": 8, "tokens_per_second": 64, "tflops": 5.0})
    silent = Throughput(1, flops=False)
    train(tiny.model(), list(tiny.loader(24)), [silent], pass_time)
    assert silent.figures == {"samples_per_second": 8}
    assert str(silent) == "8.0 samples/s, MFU n/a"


def test_a_compiled_model_is_not_watched(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    def pass_time(engine: Engine) -> None:
        clock.now += 1.0

    model = tiny.model()
    model[4].compile(backend=lambda graph, inputs: graph.forward)
    plugin = Throughput(1)
    with caplog.at_level("INFO"):
        train(model, list(tiny.loader(24)), [plugin], pass_time)
    assert plugin.figures == {"samples_per_second": 8}
    assert "give flops=" in caplog.text


def test_peaks() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert peak_of("NVIDIA H100 80GB HBM3", bf16, False) == 989.4e12
    assert peak_of("NVIDIA H100 PCIe", fp16, False) == 756e12
    assert peak_of("NVIDIA H200", fp32, True) == 494.7e12
    assert peak_of("NVIDIA A100-SXM4-40GB", fp32, False) == 19.5e12
    assert (peak_of("Tesla V100-SXM2-16GB", fp16, False), peak_of("Tesla V100-SXM2-16GB", bf16, False)) == (
        125e12,
        None,
    )
    assert (peak_of("NVIDIA L40S", bf16, False), peak_of("NVIDIA L4", bf16, False)) == (362.1e12, 121e12)
    assert (peak_of("NVIDIA H100 PCIe", torch.float64, False), peak_of("Quantum 1", bf16, False)) == (
        None,
        None,
    )


def test_values_outside_their_range() -> None:
    with pytest.raises(ValueError, match="interval=0"):
        Throughput(0)
    with pytest.raises(ValueError, match="peak=0"):
        Throughput(peak=0)

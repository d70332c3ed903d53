"""The LoRA plugin, under a bare trainer and under the real ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from orbit.adapter import (
    ConfigError,
    GradientError,
    TargetError,
    adapter_parameters,
    inject_lora,
    load,
    save,
    tasks,
)
from orbit.engine import Engine
from orbit.plugin.lora import LoRA


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    noise = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 4, generator=noise), torch.randn(6, 2, generator=noise)) for _ in range(4)]


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_building_injects_and_freezes() -> None:
    trainer = SimpleNamespace(model=net())
    plugin = LoRA(target_names=["0", "2"], r=2, alpha=4, dora=True, unlock_head_keywords=["4"], name="math")
    plugin.on_build_model(trainer)
    assert plugin.report is not None
    assert plugin.report.layers == ("0", "2")
    assert trains(trainer.model) == {"4.weight", "4.bias", *adapter_parameters(trainer.model, "math")}
    plugin.on_build_model(trainer)  # a second train(): nothing to do
    LoRA(target_names=["re:[02]"], r=2, lora_alpha=4, dora=True, name="math").on_build_model(trainer)
    assert tasks(trainer.model) == ("math",)
    with pytest.raises(ConfigError, match="the model has a task 'math' with"):
        LoRA(target_names=["0"], r=2, alpha=4, dora=True, name="math").on_build_model(trainer)
    with pytest.raises(ConfigError, match="the model has a task 'math' with"):
        LoRA(target_names=["0", "2"], r=2, alpha=4, name="math").on_build_model(trainer)


def test_an_existing_task_is_compared_in_all_its_settings(tmp_path: Path) -> None:
    """By what they mean, not by their words; a random start is forgotten by a file."""
    settings: dict[str, Any] = {
        "init": "gaussian",
        "bias": "all",
        "save_modules": ("4",),
        "rank_pattern": {"2": 3},
    }
    trainer = SimpleNamespace(model=net())
    LoRA(["0", "2"], r=2, path=tmp_path / "a", **settings).on_build_model(trainer)
    save(trainer.model, tmp_path / "a")
    load(loaded := net(), tmp_path / "a")
    LoRA(["2", "0"], r=2, **settings).on_build_model(SimpleNamespace(model=loaded))
    assert trains(loaded) == trains(trainer.model) == set(adapter_parameters(loaded))
    for changed in (
        {"init": "pissa"},
        {"bias": "none"},
        {"save_modules": ()},
        {"rank_pattern": {}},
        {"alpha_pattern": {"2": 1.0}},
        {"layers": (0,)},
        {"dropout": 0.5},
    ):
        with pytest.raises(ConfigError, match="the model has a task 'default' with"):
            LoRA(["0", "2"], r=2, **{**settings, **changed}).on_build_model(trainer)


def test_another_frozen_task_stays_frozen() -> None:
    model = inject_lora(net(), r=2, name="old")
    for parameter in adapter_parameters(model, "old").values():
        parameter.requires_grad_(False)
    LoRA(r=2, name="new").on_build_model(SimpleNamespace(model=model))
    assert trains(model) == set(adapter_parameters(model, "new"))


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="alpha=1 and lora_alpha=2 are one setting"):
        LoRA(alpha=1, lora_alpha=2)
    with pytest.raises(ConfigError, match=r"dropout=0.1 and lora_dropout=0.2 are one setting"):
        LoRA(dropout=0.1, lora_dropout=0.2)
    with pytest.raises(ConfigError, match="r must be"):
        LoRA(r=0)
    with pytest.raises(TypeError, match="LoRA has no setting 'rank_patern'; did you mean 'rank_pattern'"):
        LoRA(rank_patern={"q": 3})
    with pytest.raises(TypeError, match="LoRA has no setting 'targets'; did you mean 'target_names'"):
        LoRA(targets=["q"])
    trainer = SimpleNamespace(model=net())
    with pytest.raises(TargetError, match="'hed' names none"):
        LoRA(unlock_head_keywords="hed").on_build_model(trainer)
    assert tasks(trainer.model) == ()
    assert LoRA().config.alpha == 32
    assert LoRA(lora_alpha=5, lora_dropout=0.5).config.dropout == 0.5


def test_an_adapter_without_a_gradient_stops_the_step() -> None:
    trainer = SimpleNamespace(model=net())
    plugin = LoRA(r=2)
    plugin.on_build_model(trainer)
    trainer.model(torch.randn(2, 4)).sum().backward()
    plugin.on_before_optimizer_step(trainer)
    trainer.model.zero_grad()
    trainer.model[2](torch.randn(2, 8)).sum().backward()
    with pytest.raises(GradientError, match=r"0\.lora_A"):
        plugin.on_before_optimizer_step(trainer)


def test_a_window_of_weight_zero_does_not_stop_the_run() -> None:
    """Every label masked, say: no gradient, and none expected."""
    model = net()
    engine = Engine(model, torch.optim.AdamW(model.parameters(), lr=0.05), plugins=[LoRA(r=2)], device="cpu")
    for _ in engine.train(data(), num_epochs=1):
        loss = (engine.model(engine.data) - engine.target).square().mean()
        engine.update(loss, weight=float(engine.batch_idx % 2))
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("dora", [False, True])
def test_training_under_engine_moves_the_adapter_alone(dora: bool) -> None:
    model = net()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = Engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1),
        criterion=nn.MSELoss(),
        plugins=[LoRA(r=2, dora=dora)],
        device="cpu",
    )
    losses = []
    for _ in range(2):
        for _ in engine.train(data(), num_epochs=3):
            engine.auto_update()
            losses.append(float(engine.loss))
    assert losses[-1] < 0.9 * losses[3]  # the same batch
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.abs().sum() > 0 for name, p in after.items() if "lora_B" in name)
    assert tasks(model) == ("default",)


def test_layers_in_reach_that_cannot_be_adapted_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.exp().T

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd(8, 8)
            self.linear = nn.Linear(8, 8)

    class Trainer:
        model = nn.ModuleDict({"body": Blocks()})

    LoRA(target_names=["body"], r=2).on_build_model(Trainer())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 layer adapted" in caplog.text
    assert "left out: body.odd" in caplog.text


def test_the_adapter_is_written_at_every_epochs_end(tmp_path: Path) -> None:
    model = net()
    plugin = LoRA(r=2, dora=True, path=tmp_path / "mine")
    engine = Engine(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        criterion=nn.MSELoss(),
        plugins=[plugin],
    )
    for _ in engine.train(data(), num_epochs=2):
        if engine.is_epoch_end:
            written = (tmp_path / "mine").exists()
            assert written == (engine.epoch == 1)
        engine.auto_update()
    fresh = net()
    load(fresh, tmp_path / "mine")
    outputs = [m.eval()(data()[0][0]) for m in (model, fresh)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], net()(data()[0][0]))


def test_a_task_that_no_call_used_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """Two plugins: the second one's task is current."""
    model = net()
    plugins = [LoRA(r=2, name="first"), LoRA(r=2, name="second")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    engine = Engine(model, optimizer, nn.MSELoss(), plugins=plugins, device="cpu")
    for _ in engine.train(data(), num_epochs=1):
        engine.auto_update()
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "task 'first' got no gradient in this run: no call used it. The current route is 'second'; call "
        "model(..., task='first') or set_route"
    ]
    caplog.clear()
    for _ in engine.train(data(), num_epochs=2):
        engine.update((model(engine.data, task=["first", "second"] * 3) - engine.target).square().mean())
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("heads", [None, ["classifier"]])
def test_a_classifiers_head_that_stays_frozen_is_named(
    heads: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=8, **small))
    plugin = LoRA(r=2, unlock_head_keywords=heads)
    Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), plugins=[plugin], device="cpu").build()
    assert model.classifier.weight.requires_grad is (heads is not None)
    assert ("unlock_head_keywords=['classifier']" in caplog.text) is (heads is None)

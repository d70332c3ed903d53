"""Engine's surface: how batches are read, what it says when it cannot, and the names its users know."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from orbit.core import Outcome, Plugin
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook
from tests import tiny


def make(module: nn.Module | None = None, **options: Any) -> Engine:
    module = tiny.model() if module is None else module
    parameters = list(module.parameters())
    options = {"criterion": nn.CrossEntropyLoss(), "plugins": [], "device": "cpu"} | options
    return Engine(module, torch.optim.SGD(parameters, lr=0.1) if parameters else None, **options)


def first(engine: Engine, batch: Any) -> Engine:
    """Run one batch."""
    for _ in engine.train([batch]):
        engine.auto_update()
    return engine


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a + b)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.layer(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


X, Y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("batch", [(X, X, Y), [X, X, Y]])
def test_n_tuples_are_inputs_and_a_target(batch: Any) -> None:
    engine = make(Two())
    for _ in engine.train([batch]):
        assert engine.data[0] is not None
        assert len(engine.data) == 2
        assert torch.equal(engine.target, Y)
        loss = engine.auto_update()
        assert engine.output.shape == (4, 3)
        assert engine.loss is not None
        assert torch.equal(engine.loss, loss)
    assert engine.global_step == 1


def test_dicts_are_keyword_arguments_and_the_models_own_loss_is_used() -> None:
    engine = first(make(OwnLoss(), criterion=None), {"x": X, "labels": Y})
    assert engine.global_step == 1
    assert engine.metrics["train_loss"] > 0


def test_no_criterion_and_no_loss_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(
        ValueError, match=r"no loss for this batch: there is no criterion, and Tensor has no loss of its own"
    ):
        first(make(Two(), criterion=None), (X, X, Y))
    with pytest.raises(ValueError, match="there is criterion but the batch has no target"):
        first(make(OwnLoss()), {"x": X})


def test_a_model_that_returns_none_is_named() -> None:
    class Forgetful(Two):
        def forward(self, a: Tensor) -> None:  # type: ignore[override]
            self.layer(a)

    with pytest.raises(TypeError, match=r"Forgetful.forward returned None"):
        first(make(Forgetful()), (X, Y))


@pytest.mark.parametrize("result", ["loss", "pair", "outcome"])
def test_forward_step_replaces_model_and_criterion(result: str) -> None:
    def forward_step(engine: Engine, data: Any, target: Any) -> Any:
        loss = engine.model(data, data).logsumexp(-1).mean()
        return {"loss": loss, "pair": (loss, {"seen": 1}), "outcome": Outcome(loss, 2, {"seen": 1})}[result]

    engine = first(make(Two(), criterion=None, forward_step=forward_step), (X, Y))
    assert engine.global_step == 1
    assert engine.step_info["records"] == [{} if result == "loss" else {"seen": 1}]


def test_forward_step_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="forward_step returned str"):
        first(make(Two(), forward_step=lambda *_: "loss"), (X, Y))


def test_update_takes_a_loss_or_a_function() -> None:
    engine = make()
    for _ in engine.train(tiny.loader(16)):
        engine.update(lambda: nn.functional.cross_entropy(engine.model(engine.data), engine.target))
    assert engine.global_step == 2
    assert engine.metrics["train_loss"] > 0


def test_eval_measures_loss_and_accuracy_over_all_samples() -> None:
    engine = make()
    module = engine.model
    for _ in engine.eval(tiny.loader(23, batch_size=10)):
        engine.auto_update()
    x, y = tiny.dataset(23).tensors
    module.eval()
    logits = module(x)
    assert engine.metrics["val_loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, y).item(), rel=1e-5
    )
    assert engine.metrics["val_acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert engine.global_step == 0


def test_run_trains_evaluates_and_returns_the_metrics() -> None:
    metrics = make().run(tiny.loader(), tiny.loader(20), num_epochs=3)
    assert metrics.keys() == {"train_loss", "val_loss", "val_acc"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixed_precision": "fp8"}, ValueError, "mixed_precision='fp8' is unknown"),
        ({"grad_clip_norm": 0}, ValueError, "grad_clip=0: the largest gradient norm must be > 0"),
        ({"device": "warp"}, ValueError, "device='warp' names no device"),
        ({"criterion": 3}, TypeError, "criterion is a int"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps=0"),
        ({"max_non_finite_grad_retries": -1}, ValueError, "max_non_finite_grad_retries=-1"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_bad_arguments_are_typed_errors(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_names_the_way_out() -> None:
    with pytest.raises(ValueError, match='device="cpu"'):
        make(device="cuda")
    assert make(device=None).device.type == "cpu"


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="model is a function: Engine trains a torch.nn.Module"):
        Engine(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass a torch.optim.Optimizer"):
        Engine(tiny.model(), torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scheduler is 'cosine': pass a torch.optim.lr_scheduler"):
        Engine(tiny.model(), scheduler="cosine")


def test_outside_a_loop_there_is_no_batch() -> None:
    with pytest.raises(RuntimeError, match=r"auto_update\(\) needs a batch"):
        make().auto_update()
    engine = make()
    for _ in engine.train(tiny.loader(8)):
        engine.auto_update()
    with pytest.raises(RuntimeError, match=r"update\(\) needs a batch"):
        engine.update(torch.tensor(1.0))


def test_without_an_optimizer_it_evaluates_and_does_not_train() -> None:
    engine = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=[], device="cpu")
    for _ in engine.eval(tiny.loader(8)):
        engine.auto_update()
    with pytest.raises(RuntimeError, match="Engine has no optimizer"):
        first(engine, next(iter(tiny.loader())))


def test_two_loops_at_once_are_refused() -> None:
    engine = make()
    for _ in engine.train(tiny.loader(8)):
        with pytest.raises(RuntimeError, match="already running"):
            next(iter(engine.train(tiny.loader(8))))
        engine.auto_update()
    assert engine.global_step == 1


class Freeze(Plugin):
    """A transform: freezes the first layer and adds a trained scale to the last one."""

    priority = Plugin.TRANSFORM

    def on_build_model(self, trainer: Any) -> None:
        trainer.model[0].requires_grad_(False)
        trainer.model[4].scale = nn.Parameter(torch.ones(3))


def test_an_optimizer_follows_what_a_plugin_made_of_the_model() -> None:
    """Frozen parameters leave with their state; new ones join the group of the weight they sit beside."""
    module = tiny.model()
    optimizer = torch.optim.AdamW(
        [{"params": module[:4].parameters(), "lr": 0.1}, {"params": module[4:].parameters(), "lr": 0.2}]
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    module(tiny.dataset(8).tensors[0]).sum().backward()
    optimizer.step()
    engine = Engine(module, optimizer, nn.CrossEntropyLoss(), schedule, plugins=[Freeze()], device="cpu")
    engine.build()
    assert module[0].weight not in optimizer.state
    assert module[4].weight in optimizer.state
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert groups[0] == {id(p) for p in module[1].parameters()}
    assert groups[1] == {id(p) for p in module[4].parameters()}
    assert id(module[4].scale) in groups[1]
    frozen = module[0].weight.detach().clone()
    for _ in engine.train(tiny.loader(8)):
        engine.auto_update()
    assert torch.equal(module[0].weight, frozen)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_freezing_everything_is_an_error() -> None:
    class FreezeAll(Plugin):
        def on_build_model(self, trainer: Any) -> None:
            trainer.model.requires_grad_(False)

    with pytest.raises(ValueError, match="nothing is left to train"):
        first(make(plugins=[FreezeAll()]), next(iter(tiny.loader())))


def test_print_goes_to_the_console_with_its_speaker() -> None:
    out = io.StringIO()
    engine = make(console=Console(file=out, width=60))
    engine.print("hello", plugin="Board")
    assert out.getvalue() == "Board hello\n"


def test_attach_meta_and_unwrap() -> None:
    engine = make()
    plugin = Plugin()
    engine.attach(plugin)
    assert engine.plugins == [plugin]
    assert engine.meta == {}
    assert engine.unwrap_model() is engine.model


def test_max_steps_ends_a_run_inside_an_epoch() -> None:
    engine = make()
    for _ in engine.train(tiny.loader(), num_epochs=5, max_steps=9):
        engine.auto_update()
    assert engine.global_step == 9


def test_metrics_are_those_of_the_current_epoch() -> None:
    engine = make()
    seen = []
    for _ in engine.train(tiny.loader(8), num_epochs=3):
        seen.append(dict(engine.metrics))
        engine.auto_update()
        engine.metrics[f"mine_{engine.epoch}"] = 1.0
    assert seen == [{}, {}, {}]
    assert engine.metrics.keys() == {"mine_2", "train_loss"}


def test_a_body_that_leaves_out_the_last_batch_still_closes_the_window() -> None:
    engine = make(gradient_accumulation_steps=2)
    for _ in engine.train(tiny.loader(32)):  # four micro-batches
        if engine.batch_idx < 3:
            engine.auto_update()
    assert engine.global_step == 2
    assert not engine.window_open


def test_no_loss_skips_a_micro_batch_and_is_returned_as_none() -> None:
    seen = []
    engine = make(Two(), criterion=None, forward_step=lambda *_: None)
    for _ in engine.train([(X, Y)] * 2):
        seen += [engine.auto_update()]
    engine = make()
    for _ in engine.train(tiny.loader(16)):
        seen += [engine.update(None)]
    assert seen == [None] * 4
    assert engine.global_step == 2


class Tokens(nn.Module):
    """(B, T, 8) → (B, 3, T): a class for every position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).transpose(1, 2)


def ragged() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(6, 5, 8, generator=generator).double(),
        torch.randint(0, 3, (6, 5), generator=generator),
    )
    y[0, 1:], y[1, 2:] = 7, 7
    return x, y


def test_ignored_targets_have_no_weight_in_a_window() -> None:
    moved = []
    for sizes in ([6], [2, 4]):
        model = Tokens()
        engine = Engine(
            model, torch.optim.SGD(model.parameters(), lr=1.0), nn.CrossEntropyLoss(ignore_index=7), plugins=[],
            device="cpu", gradient_accumulation_steps=len(sizes),
        )  # fmt: skip
        for _ in engine.train(list(zip(*(part.split(sizes) for part in ragged()), strict=True))):
            engine.auto_update()
        moved.append(model.layer.weight.detach())
    assert torch.allclose(*moved, rtol=0, atol=1e-12)


def test_ignored_targets_do_not_count_in_the_accuracy() -> None:
    model, (x, y) = Tokens(), ragged()
    y[y != 7] = model(x).argmax(1)[y != 7]
    engine = Engine(model, None, nn.CrossEntropyLoss(ignore_index=7), plugins=[], device="cpu")
    for _ in engine.eval([(x, y), (x[:1], torch.full((1, 5), 7))]):
        engine.auto_update()
    assert engine.metrics["val_acc"] == 1.0


def test_without_num_epochs_it_is_one_epoch_or_as_many_as_max_steps_needs() -> None:
    engine = make()
    for _ in engine.train(tiny.loader(16)):
        engine.auto_update()
    assert engine.global_step == 2
    for _ in engine.train(tiny.loader(16), max_steps=9):
        engine.auto_update()
    assert engine.global_step == 9


def test_a_batch_class_of_its_own_is_moved_by_its_own_method() -> None:
    class Graph:
        def __init__(self) -> None:
            self.moved_to: Any = None

        def to(self, device: torch.device) -> Graph:
            self.moved_to = device
            return self

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, graph: Graph) -> Any:
            assert graph.moved_to == torch.device("cpu")
            return SimpleNamespace(loss=self.layer(X).mean())

    assert first(make(Reads(), criterion=None), Graph()).global_step == 1


def test_an_optimizer_that_holds_nothing_trainable_is_refused() -> None:
    """Adapters injected by hand after the optimizer was made would silently never train."""
    engine = make()
    engine.model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="nothing is left to train: .* Were adapters injected after it was made"
    ):
        first(engine, next(iter(tiny.loader())))


def test_checkpoint_dir_and_a_hook_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint_dir= is short for a CheckpointingHook"):
        make(plugins=[CheckpointingHook(path=tmp_path)], checkpoint_dir=tmp_path)


def test_an_engine_without_an_optimizer_loads_what_evaluation_needs(tmp_path: Path) -> None:
    module = tiny.model()
    optimizer = tiny.optimizer(module)
    engine = Engine(
        module, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), plugins=[], device="cpu"
    )
    engine.run(tiny.loader(), tiny.loader(), num_epochs=2)
    path = engine.save(tmp_path / "trained.pt")
    for precision in (None, "fp16"):
        judge = Engine(
            tiny.model(2),
            criterion=nn.CrossEntropyLoss(),
            plugins=[],
            mixed_precision=precision,
            device="cpu",
        ).load(path)
        assert tiny.same(judge.model, module)
        for _ in judge.eval(tiny.loader()):
            judge.auto_update()
        assert judge.metrics["val_loss"] == pytest.approx(engine.metrics["val_loss"], rel=1e-2)
    with pytest.raises(ValueError, match="the state of its lr_scheduler and this run has none"):
        Engine(tiny.model(2), tiny.optimizer(tiny.model(2)), plugins=[], device="cpu").load(path)


def test_a_run_that_trains_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    engine = make()
    for _ in engine.train(tiny.loader()):
        pass
    assert "no batch of this epoch was trained on: call auto_update()" in caplog.text
    caplog.clear()
    engine.run(tiny.loader())
    assert not caplog.records
    stranger = tiny.optimizer(tiny.model(2))
    Engine(tiny.model(), stranger, nn.CrossEntropyLoss(), plugins=[], device="cpu").run(tiny.loader())
    assert "parameters that AdamW holds is the model's, which will not train" in caplog.text


def test_a_loss_of_torch_gets_a_tensor_or_says_how() -> None:
    engine = make(OwnLoss())
    with pytest.raises(
        TypeError, match=r"criterion=lambda output, target: nn.CrossEntropyLoss\(\)\(output.logits"
    ):
        first(engine, (X, Y))
    loss = nn.CrossEntropyLoss()
    assert first(make(OwnLoss(), criterion=lambda output, y: loss(output.logits, y)), (X, Y)).global_step == 1

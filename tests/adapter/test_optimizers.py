"""Many tasks trained at once: each learns as if it were alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR
from torch.utils.data import DataLoader

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    TaskError,
    TaskOptimizers,
    adapter_parameters,
    inject,
    param_groups,
    per_task_loss,
    route,
)
from orbit.core.param_groups import reconcile, snapshot
from orbit.engine import Engine
from orbit.trainer import BaseTrainer
from tests.ranks import on_ranks

Make = Callable[..., nn.Module]
Fill = Callable[..., None]
Batch = tuple[Tensor, Tensor, list[Any]]

CONFIGS = {"a": AdapterConfig(r=2), "b": AdapterConfig(r=3, dora=True), "c": AdapterConfig(r=4, gated=True)}
LR = {"a": 1e-2, "b": 3e-3, "c": 2e-2}
CLIP = {"a": 0.05, "b": 0.5, "c": None}
# The rows of each batch: with tasks missing, rows of the base, and one task alone.
ROWS: list[list[str | None]] = [
    ["a", "b", "c", "a"],
    ["b", "b", "b", None],
    ["c", "a", None, "c"],
    ["a", "a", "a", "a"],
    ["b", "c", "a", None],
    [None, None, None, None],
    ["c", "b", "b", "a"],
    ["b", "a", "c", "c"],
]


@pytest.fixture
def model(llama: Make, fill: Fill) -> nn.Module:
    """A Llama with three tasks of different kinds and ranks."""
    model = llama(initializer_range=0.2).train()
    for seed, (task, config) in enumerate(CONFIGS.items()):
        inject(model, config, task)
        fill(model, task, seed, size=0.1)
    return model


def data() -> list[Batch]:
    """(ids, labels, rows) with a ragged number of supervised tokens; in batch 4 all of c's are masked."""
    noise = torch.Generator().manual_seed(11)
    found: list[Batch] = []
    for number, rows in enumerate(ROWS):
        ids = torch.randint(1, 64, (len(rows), 9), generator=noise)
        labels = ids.clone()
        for row, start in enumerate(torch.randint(1, 8, (len(rows),), generator=noise).tolist()):
            labels[row, :start] = -100
            if number == 4 and rows[row] == "c":
                labels[row] = -100
        found.append((ids, labels, rows))
    return found


def token_losses(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, positions) losses, and which of them count."""
    logits, target = model(ids).logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(
        logits.transpose(1, 2), target, reduction="none", ignore_index=-100
    ), target != -100


def optimizers(model: nn.Module, clip: Any = CLIP) -> TaskOptimizers:
    parts = {
        task: AdamW(adapter_parameters(model, task).values(), lr=lr, weight_decay=0.1)
        for task, lr in LR.items()
    }
    return TaskOptimizers(
        parts,
        clip=clip,
        schedules={"a": CosineAnnealingLR(parts["a"], 8), "b": LinearLR(parts["b"], 0.1, 1.0, 5)},
    )


def alone(model: nn.Module, task: str, windows: list[list[Batch]]) -> dict[str, Tensor]:
    """The task's parameters after a run of its own, in plain torch."""
    parameters = list(adapter_parameters(model, task).values())
    optimizer = AdamW(parameters, lr=LR[task], weight_decay=0.1)
    schedule = {
        "a": lambda: CosineAnnealingLR(optimizer, 8),
        "b": lambda: LinearLR(optimizer, 0.1, 1.0, 5),
        "c": lambda: None,
    }[task]()
    for window in windows:
        sums, count = [], 0
        for ids, labels, rows in window:
            own = [row for row, name in enumerate(rows) if name == task]
            if own:
                with route(model, task):
                    losses, counts = token_losses(model, ids[own], labels[own])
                sums.append((losses * counts).sum())
                count += int(counts.sum())
        if not count:
            continue
        (sum(sums) / count).backward()
        if CLIP[task] is not None:
            nn.utils.clip_grad_norm_(parameters, CLIP[task])
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return {name: p.detach().clone() for name, p in adapter_parameters(model, task).items()}


def forward(optimizer: TaskOptimizers) -> Callable[..., Any]:
    """An Engine's `forward_step` over these batches."""

    def step(engine: Engine, data: tuple[Tensor, Tensor, list[Any]], target: Any) -> Any:
        ids, labels, rows = data
        with route(engine.model, rows):
            losses, counts = token_losses(engine.model, ids, labels)
        return optimizer.outcome(losses, rows, counts)

    return step


def engine_of(model: nn.Module, optimizer: TaskOptimizers, accumulation: int = 1) -> Engine:
    return Engine(
        model,
        optimizer,
        forward_step=forward(optimizer),
        plugins=[],
        device="cpu",
        gradient_accumulation_steps=accumulation,
    )


def batches() -> DataLoader[Any]:
    """((ids, labels, rows), no target) for an Engine."""
    return DataLoader(data(), batch_size=1, collate_fn=lambda found: (found[0], None))  # type: ignore[arg-type]


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_three_tasks_together_are_three_runs(model: nn.Module, accumulation: int) -> None:
    found = data()
    windows = [found[i : i + accumulation] for i in range(0, len(found), accumulation)]
    expected = {task: alone(copy.deepcopy(model), task, windows) for task in CONFIGS}
    engine = engine_of(model, optimizers(model), accumulation)
    for _ in engine.train(batches()):
        engine.auto_update()
    assert engine.global_step == len(windows)
    worst = 0.0
    for task in CONFIGS:
        for name, parameter in adapter_parameters(model, task).items():
            worst = max(worst, (parameter - expected[task][name]).abs().max().item())
    assert worst < 1e-5


def test_a_loop_of_ones_own(model: nn.Module) -> None:
    expected = {task: alone(copy.deepcopy(model), task, [[batch] for batch in data()]) for task in CONFIGS}
    optimizer = optimizers(model)
    seen = []
    for ids, labels, rows in data():
        with route(model, rows):
            losses, counts = token_losses(model, ids, labels)
        if losses.requires_grad:
            optimizer.outcome(losses, rows, counts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.stepped)
    assert seen == [
        ("a", "b", "c"),
        ("b",),
        ("a", "c"),
        ("a",),
        ("a", "b"),
        (),
        ("a", "b", "c"),
        ("a", "b", "c"),
    ]
    for task in CONFIGS:
        for name, parameter in adapter_parameters(model, task).items():
            torch.testing.assert_close(parameter, expected[task][name], atol=1e-5, rtol=0)


def snap(optimizer: TaskOptimizers, task: str) -> list[Any]:
    part = optimizer._optimizers[task]
    state = copy.deepcopy(
        {**part.state_dict(), "schedule": optimizer.state_dict()["tasks"][task]["schedule"]}
    )
    return [state, [p.detach().clone() for group in part.param_groups for p in group["params"]]]


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


def test_an_absent_task_is_untouched_to_the_bit(model: nn.Module) -> None:
    """Parameters, optimizer state, schedule; also one whose every token is masked."""
    optimizer = optimizers(model)
    engine = engine_of(model, optimizer)
    before: dict[str, list[Any]] = {}
    absent = {1: "ac", 2: "b", 3: "bc", 4: "c", 5: "abc"}
    for number, _ in enumerate(engine.train(batches())):
        before = {task: snap(optimizer, task) for task in CONFIGS}
        engine.auto_update()
        for task in CONFIGS:
            if task in absent.get(number, ""):
                assert_equal(snap(optimizer, task), before[task])
            else:
                assert not torch.equal(snap(optimizer, task)[1][-1], before[task][1][-1])


def test_a_killed_and_resumed_run_is_bitwise(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    engine = engine_of(model, optimizers(model))
    for _ in engine.train(batches()):
        engine.auto_update()
    whole = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}

    first = copy.deepcopy(other)
    engine = engine_of(first, optimizers(first))
    for _ in engine.train(batches()):
        engine.auto_update()
        if engine.global_step == 4:
            break
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    file.seek(0)
    del first, engine

    engine = engine_of(other, optimizers(other))
    engine.load_state_dict(torch.load(file, weights_only=True))
    steps = 0
    for _ in engine.train(batches()):
        engine.auto_update()
        steps += 1
    assert steps == 4
    for name, parameter in adapter_parameters(other).items():
        assert torch.equal(parameter, whole[name]), name


def test_states_of_another_run_are_refused(model: nn.Module) -> None:
    optimizer = optimizers(model)
    state = optimizer.state_dict()
    broken = []
    for change in ("task", "schedule", "parameters"):
        other = copy.deepcopy(state)
        if change == "task":
            other["tasks"]["d"] = other["tasks"].pop("c")
        elif change == "schedule":
            other["tasks"]["a"]["schedule"] = None
        else:
            other["param_groups"][-1]["params"].pop()
        broken.append(other)
    for other, message in zip(broken, ["of tasks", "has a schedule", "other parameters"], strict=True):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other)
        assert_equal(optimizer.state_dict(), state)


def test_the_cores_clipping_is_refused_beside_it(model: nn.Module) -> None:
    engine = Engine(model, optimizers(model), plugins=[], device="cpu", grad_clip_norm=1.0)
    with pytest.raises(ValueError, match="TaskOptimizers clips by itself"):
        next(iter(engine.train(batches())))


def test_what_does_not_belong_together_is_refused(model: nn.Module) -> None:
    part = {task: SGD(adapter_parameters(model, task).values(), lr=0.1) for task in CONFIGS}
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ConfigError, "at least one", lambda: TaskOptimizers({})),
        (ConfigError, "share a parameter", lambda: TaskOptimizers({"a": part["a"], "b": part["a"]})),
        (ConfigError, "pass a torch.optim.Optimizer", lambda: TaskOptimizers({"a": 3})),  # type: ignore[dict-item]
        (ConfigError, "must be > 0", lambda: TaskOptimizers(part, clip=0.0)),
        (TaskError, "clip names 'd'", lambda: TaskOptimizers(part, clip={"d": 1.0})),
        (ConfigError, "not made from", lambda: TaskOptimizers(part, schedules={"a": LinearLR(part["b"])})),
        (ConfigError, "closure=", lambda: TaskOptimizers({"a": torch.optim.LBFGS([torch.zeros(1)])})),
    ]
    for kind, message, make in cases:
        with pytest.raises(kind, match=message):
            make()
    optimizer = TaskOptimizers(part)
    with pytest.raises(ConfigError, match="to their task's own optimizer"):
        optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(TaskError, match="of task 'd', which has no optimizer"):
        optimizer.outcome(torch.zeros(2), ["a", "d"])
    with pytest.raises(ValueError, match=r"\(rows,\) or \(rows, positions\)"):
        optimizer.outcome(torch.zeros(3), ["a", "b"])
    with pytest.raises(ValueError, match="must have the shape of losses"):
        optimizer.outcome(torch.zeros(2, 3), ["a", "b"], torch.ones(2))


def test_it_is_an_optimizer(model: nn.Module) -> None:
    """States and groups are those of its parts, as others read and edit them."""
    optimizer = optimizers(model)
    for part in optimizer._optimizers.values():
        assert any(part.param_groups[0] is group for group in optimizer.param_groups)
    for parameter in adapter_parameters(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for part in optimizer._optimizers.values():
        assert any(part.param_groups[0] is group for group in optimizer.param_groups)
    everything = list(adapter_parameters(model).values())
    assert set(map(id, optimizer.state)) == set(map(id, everything))
    assert optimizer.state[everything[0]]["step"] == 1
    before = snapshot(model)
    for parameter in adapter_parameters(model, "c").values():
        parameter.requires_grad_(False)
    left, joined = reconcile(optimizer, model, before)
    assert (left, joined) == (len(adapter_parameters(model, "c")), 0)
    assert not optimizer._optimizers["c"].state
    assert optimizer._optimizers["a"].state


def test_evaluation_inside_a_window_counts_nothing(model: nn.Module) -> None:
    optimizer = optimizers(model)
    with torch.no_grad():
        optimizer.outcome(torch.ones(2, 3), ["a", "b"])
    assert not optimizer._units


def test_a_dropped_window_is_forgotten(model: nn.Module) -> None:
    """The core drops a window without a word to the optimizer: its units must not be counted with the next one's."""
    twin = copy.deepcopy(model)
    results = []
    for net, bad in ((model, True), (twin, False)):
        optimizer = optimizers(net)
        engine = engine_of(net, optimizer)
        engine.max_non_finite_grad_retries = 1
        poison = [True] if bad else []

        def step(
            engine: Engine, data: Any, target: Any, poison: list[bool] = poison, o: Any = optimizer
        ) -> Any:
            outcome = forward(o)(engine, data, target)
            if poison:
                poison.pop()
                return type(outcome)(outcome.loss * float("nan"), outcome.weight)
            return outcome

        engine.forward_step = step
        for _ in engine.train([(data()[3], None), (data()[0], None)] if bad else [(data()[0], None)]):
            engine.auto_update()
        results.append([p.detach() for p in adapter_parameters(net).values()])
    assert_equal(*results)


# -- the loss alone ------------------------------------------------------------------------------------------


def test_per_task_loss_by_rows_and_by_tokens() -> None:
    losses = torch.tensor([[1.0, 2.0, float("nan")], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0], [4.0, 4.0, 4.0]])
    losses.requires_grad_()
    counted = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 0]]).bool()
    loss = per_task_loss(losses, ["a", "a", None, "b"], counted)
    assert loss.item() == pytest.approx((1 + 2 + 3 + 7) / 4)
    loss.backward()
    assert losses.grad is not None
    assert torch.equal(losses.grad, torch.tensor([[0.25, 0.25, 0], [0.25, 0, 0.25], [0, 0, 0], [0, 0, 0]]))


# -- LoRA+ ---------------------------------------------------------------------------------------------------


def test_lora_plus_groups(mlp: Make, fill: Fill) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2, dora=True), "a")
    inject(model, AdapterConfig(r=2, gated=True), "b")
    model[3].weight.requires_grad_(True)  # an unlocked head
    names = {id(p): name for name, p in model.named_parameters()}
    slow, fast = param_groups(model, lr=1e-3, b_ratio=8, weight_decay=0.1)
    assert {names[id(p)] for p in fast["params"]} == {f"{i}.lora_B.{t}.weight" for i in (0, 2) for t in "ab"}
    assert {names[id(p)] for p in slow["params"]} == {
        n for n, p in model.named_parameters() if p.requires_grad
    } - {names[id(p)] for p in fast["params"]}
    assert (slow["lr"], fast["lr"], slow["weight_decay"], fast["weight_decay"]) == (1e-3, 8e-3, 0.1, 0.1)
    slow, fast = param_groups(model, "b", lr=1e-3)
    assert {names[id(p)] for p in fast["params"]} == {f"{i}.lora_B.b.weight" for i in (0, 2)}
    assert {names[id(p)] for p in slow["params"]} == {
        f"{i}.lora_{x}.b.weight" for i in (0, 2) for x in ("A", "gate")
    }
    with pytest.raises(TaskError, match="no task 'c'"):
        param_groups(model, "c", lr=1e-3)
    with pytest.raises(ConfigError, match="b_ratio=0"):
        param_groups(model, lr=1e-3, b_ratio=0)


def test_lora_plus_groups_of_every_kind() -> None:
    """Embeddings, convolutions and attention have Bs too."""
    model = nn.ModuleDict(
        {
            "emb": nn.Embedding(9, 8),
            "conv": nn.Conv1d(8, 8, 3),
            "att": nn.MultiheadAttention(8, 2),
            "fc": nn.Linear(8, 8),
        }
    )
    inject(model, AdapterConfig(r=2, targets=("emb", "conv", "att", "fc")))
    names = {id(p): name for name, p in model.named_parameters()}
    slow, fast = ({names[id(p)] for p in group["params"]} for group in param_groups(model, lr=1e-3))
    assert {name.split(".")[0] for name in fast} == {"emb", "conv", "att", "fc"}
    assert all("B" in name for name in fast)
    assert all("A" in name for name in slow)
    assert len(slow) == len(fast)


def test_lora_plus_steps_as_it_is_defined(mlp: Make, fill: Fill) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2))
    fill(model)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    optimizer = SGD(param_groups(model, lr=1e-2, b_ratio=16))
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    for name, p in adapter_parameters(model).items():
        assert p.grad is not None
        rate = 0.16 if "lora_B" in name else 0.01
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_bs_group_survives_what_a_plugin_changes(mlp: Make) -> None:
    """core/param_groups.py: those that stay keep their group; a new task's B joins the other Bs."""
    model = mlp()
    inject(model, AdapterConfig(r=2), "a")
    optimizer = SGD(param_groups(model, lr=1e-2), lr=1e-2)
    before = snapshot(model)
    inject(model, AdapterConfig(r=2), "b")
    adapter_parameters(model, "a")["0.lora_A.a.weight"].requires_grad_(False)
    reconcile(optimizer, model, before)
    names = {id(p): name for name, p in model.named_parameters()}
    slow, fast = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert slow == {"2.lora_A.a.weight", "0.lora_A.b.weight", "2.lora_A.b.weight"}
    assert fast == {f"{i}.lora_B.{t}.weight" for i in (0, 2) for t in "ab"}


def test_a_new_task_does_not_join_anothers_optimizer(model: nn.Module) -> None:
    optimizer, before = optimizers(model), snapshot(model)
    inject(model, AdapterConfig(r=2), "d")
    groups = copy.copy(optimizer.param_groups)
    with pytest.raises(
        ValueError, match=r"lora_A.d.weight trains since .* TaskOptimizers keeps its parts apart"
    ):
        reconcile(optimizer, model, before)
    assert_equal([len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in groups])


def test_a_scheduler_over_all_and_a_scaler(mlp: Make) -> None:
    """What others wrap around an optimizer works around this one too."""
    model = mlp()
    for task in "ab":
        inject(model, AdapterConfig(r=2), task)
    optimizer = TaskOptimizers(
        {t: SGD(adapter_parameters(model, t).values(), lr=0.1) for t in "ab"}, clip=10.0
    )
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    losses = model(torch.ones(2, 6), task=["a", "a"]).square().mean(1)
    scaler.scale(optimizer.outcome(losses, ["a", "a"]).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    assert [part.param_groups[0]["lr"] for part in optimizer._optimizers.values()] == [0.05, 0.05]
    for name, parameter in adapter_parameters(model, "a").items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * parameter.grad)
    for name, parameter in adapter_parameters(model, "b").items():
        assert torch.equal(parameter, before[name])


def test_under_a_trainer(model: nn.Module) -> None:
    """The other face: `build_optimizer` returns it, `forward` returns its outcome."""

    class Tasks(BaseTrainer):
        def build_data_loader(self) -> Any:
            return DataLoader(data(), batch_size=1, collate_fn=lambda found: found[0])  # type: ignore[arg-type]

        def build_model(self) -> nn.Module:
            return model

        def build_optimizer(self) -> TaskOptimizers:
            return optimizers(self.model)

        def forward(self, input: Batch) -> Any:
            ids, labels, rows = input
            with route(self.model, rows):
                losses, counts = token_losses(self.model, ids, labels)
            return self.optimizer.outcome(losses, rows, counts)  # type: ignore[attr-defined]

    expected = {task: alone(copy.deepcopy(model), task, [[batch] for batch in data()]) for task in CONFIGS}
    Tasks(max_steps=8, device="cpu").train()
    for task in CONFIGS:
        for name, parameter in adapter_parameters(model, task).items():
            torch.testing.assert_close(parameter, expected[task][name], atol=1e-5, rtol=0)


def test_losses_of_a_window_before_its_first_backward() -> None:
    """A loop of one's own knows the units of a window only when it has all of its losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    for task in ("a", "b"):
        inject(model, AdapterConfig(r=2, targets=("0", "2")), task)
        for parameter in adapter_parameters(model, task).values():
            parameter.data.normal_().requires_grad_()
    x, windows = torch.randn(2, 4, 4, dtype=torch.float64), [["a", "b", "a", "a"], ["b", None, "b", "a"]]
    for dropped in (False, True):
        alone = {}
        for task in ("a", "b"):
            losses = [
                model(part[[name == task for name in rows]], task=task).square().mean(1)
                for part, rows in zip(x, windows, strict=True)
            ]
            own = adapter_parameters(model, task)
            alone.update(
                zip(own, torch.autograd.grad(torch.cat(losses).mean(), list(own.values())), strict=True)
            )
        optimizer = TaskOptimizers(
            {t: torch.optim.SGD(adapter_parameters(model, t).values(), lr=1.0) for t in ("a", "b")}
        )
        if dropped:  # without a word to the optimizer
            optimizer.outcome(model(x[0], task=windows[1]).square().mean(1), windows[1]).loss.backward()
            model.zero_grad()
        before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
        outs = [
            optimizer.outcome(model(part, task=rows).square().mean(1), rows)
            for part, rows in zip(x, windows, strict=True)
        ]
        units = sum(out.weight for out in outs)
        for out in outs:
            (out.loss * out.weight / units).backward()
        optimizer.step()
        for name, parameter in adapter_parameters(model).items():
            torch.testing.assert_close(before[name] - parameter, alone[name])
        optimizer.zero_grad()


ROWS_OF_RANKS = [
    (["a", "a", "b", "a"], ["b", "b", "c", None]),  # step by step, the rows of each of two ranks
    (["a", "b", "b", "b"], ["a", "a", "a", "b"]),
    (["c", "c", "c", "c"], ["c", "a", "a", "c"]),
]


def three_tasks() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for task in "abc":
        inject(model, AdapterConfig(r=2, targets=("0", "2")), task)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
        parameter.requires_grad_()
    return model, torch.randn(3, 2, 4, 5, dtype=torch.float64)


def train_on_a_rank() -> dict[str, Tensor]:
    rank = dist.get_rank()
    model, x = three_tasks()
    parts = {t: SGD(adapter_parameters(model, t).values(), lr=0.1, momentum=0.9) for t in "abc"}
    optimizer = TaskOptimizers(parts)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for step, rows in enumerate(ROWS_OF_RANKS):
        out = optimizer.outcome(parallel(x[step, rank], task=rows[rank]).square().mean(1), rows[rank])
        units = torch.tensor(float(out.weight))
        dist.all_reduce(units)
        (out.loss * out.weight / units * 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_ranks_train_together_what_one_process_would_train() -> None:
    ranks = on_ranks("tests.adapter.test_optimizers:train_on_a_rank", 2)
    model, x = three_tasks()
    for task in "abc":
        optimizer = SGD(adapter_parameters(model, task).values(), lr=0.1, momentum=0.9)
        for step, rows in enumerate(ROWS_OF_RANKS):
            own = [x[step, k, [name == task for name in rows[k]]] for k in range(2)]
            if sum(map(len, own)):
                model(torch.cat(own), task=task).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for got in ranks:
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(got[name], expected)

"""Training a mixture: its router alone or with its experts, by every loop, in every precision, resumed to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from orbit.adapter import RouteError, adapter_parameters, check_gradients, route, set_trainable
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook
from orbit.trainer import BaseTrainer
from orbit.xlora import from_pretrained
from tests.xlora.oracle import VOCABULARY, llama, mixture, tokens

SETTINGS = {"layerwise_scalings": True, "top_k_lora": 2, "xlora_depth": 2, "xlora_dropout_p": 0.2}


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    """Texts of 9 tokens, each a run of numbers from a random one on: something that can be learned."""
    starts = torch.randint(1, VOCABULARY - 10, (count,), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": start + torch.arange(9), "labels": start + torch.arange(9)} for start in starts]


def loader(size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=size, **options)  # type: ignore[arg-type]


def optimizer(model: nn.Module, lr: float = 0.03) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def parts(model: Any) -> dict[str, dict[str, Tensor]]:
    """Copies of what the classifier, the experts and the base have."""
    experts = adapter_parameters(model)
    found: dict[str, dict[str, Tensor]] = {"classifier": {}, "experts": {}, "base": {}}
    for name, tensor in model.state_dict().items():
        part = (
            "classifier" if name.startswith("xlora_classifier.") else "experts" if name in experts else "base"
        )
        found[part][name] = tensor.clone()
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Trainer(BaseTrainer):
    def __init__(self, max_steps: int, model: Any, hooks: list[Any] | None = None, **options: Any) -> None:
        super().__init__(max_steps, device="cpu", **options)
        self.given, self.hooks_given = model, hooks or []

    def build_data_loader(self) -> Any:
        return loader(shuffle=True)

    def build_model(self) -> nn.Module:
        return self.given

    def build_optimizer(self) -> torch.optim.Optimizer:
        return optimizer(self.model)

    def build_lr_scheduler(self) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)

    def build_hooks(self) -> list[Any]:
        return self.hooks_given

    def forward(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.model(**input).loss, {}


def by_engine(model: Any, folder: Path) -> None:
    engine = Engine(model, optimizer(model), plugins=[], device="cpu", grad_clip_norm=1.0)
    for _ in engine.train(loader(), num_epochs=2):
        engine.auto_update()


def by_base_trainer(model: Any, folder: Path) -> None:
    Trainer(12, model).train()


def by_transformers(model: Any, folder: Path) -> None:
    hugging_face(model, folder, num_train_epochs=2, save_strategy="no").train()


def hugging_face(model: Any, folder: Path, **options: Any) -> Any:
    from transformers import Trainer as HFTrainer
    from transformers import TrainingArguments

    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.03, "report_to": [], "use_cpu": True}
    settings |= {"disable_tqdm": True, "logging_strategy": "no", "seed": 3, "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return HFTrainer(model=model, args=arguments, train_dataset=rows())


@pytest.mark.parametrize("trains_experts", [False, True], ids=["router", "router and experts"])
@pytest.mark.parametrize("train", [by_engine, by_base_trainer, by_transformers])
def test_what_trains_moves_and_the_rest_does_not(
    train: Callable[[Any, Path], None], trains_experts: bool, tmp_path: Path
):
    model = mixture(**SETTINGS, use_trainable_adapters=trains_experts)
    batch = next(iter(loader(24)))
    before, loss = parts(model), model.eval()(**batch).loss.item()
    train(model, tmp_path)
    after = parts(model)
    assert same(before["base"], after["base"])
    assert same(before["experts"], after["experts"]) is not trains_experts
    moved = [
        name
        for name, tensor in before["classifier"].items()
        if not torch.equal(tensor, after["classifier"][name])
    ]
    assert moved == list(before["classifier"])
    if trains_experts:
        assert not any(torch.equal(t, after["experts"][name]) for name, t in before["experts"].items())
    assert model.eval()(**batch).loss.item() < loss - 0.1
    assert model.get_use_trainable_adapters() is trains_experts
    assert {p.requires_grad for p in adapter_parameters(model).values()} == {trains_experts}


# -- resuming ------------------------------------------------------------------------------------------------


def test_base_trainer_resumes_to_the_bit(tmp_path: Path):
    """Its classifier has dropout, so the random numbers of the resumed steps must be those of the whole run."""

    def fresh(steps: int) -> Trainer:
        model = mixture(**SETTINGS, use_trainable_adapters=True)
        torch.manual_seed(5)
        return Trainer(
            steps, model, [CheckpointingHook(interval=4, keep_previous=None, path=tmp_path / str(steps))]
        )

    whole, again = fresh(9), fresh(10)
    whole.train()
    torch.manual_seed(6)
    again.max_steps = 9
    again.hooks_given[0].load = tmp_path / "9" / "checkpoint_step_4.pt"
    again.train()
    assert same(whole.model.state_dict(), again.model.state_dict())
    assert not same(whole.model.state_dict(), mixture(**SETTINGS).state_dict())


def test_engine_resumes_to_the_bit():
    def run(state: dict[str, Any] | None = None, leave_at: int | None = None) -> tuple[Any, dict[str, Any]]:
        model = mixture(**SETTINGS, use_trainable_adapters=True)
        torch.manual_seed(5 if state is None else 6)
        engine = Engine(model, optimizer(model), plugins=[], device="cpu")
        if state is not None:
            engine.load_state_dict(state)
        taken = {}
        for _ in engine.train(loader(shuffle=True), num_epochs=2):
            engine.auto_update()
            if engine.global_step == leave_at:
                taken = copy.deepcopy(engine.state_dict())
        return model, taken

    whole, state = run(leave_at=5)
    again, _ = run(state)
    assert same(whole.state_dict(), again.state_dict())


@pytest.mark.parametrize("experts_train", [False, True])
def test_transformers_saves_and_resumes(
    experts_train: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)  # to where caplog listens

    def fresh() -> Any:
        return mixture(**SETTINGS, use_trainable_adapters=experts_train)

    options = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2}
    whole, again = fresh(), fresh()
    hugging_face(whole, tmp_path, **options).train()
    caplog.clear()
    hugging_face(again, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "missing keys" not in caplog.text
    assert same(whole.state_dict(), again.state_dict())
    assert not same(whole.state_dict(), fresh().state_dict())
    loaded = from_pretrained(tmp_path / "checkpoint-6", llama(), list(whole.xlora_experts), device="cpu")
    assert torch.equal(loaded.eval()(tokens()).logits, whole.eval()(tokens()).logits)


def test_transformers_resumes_an_expert_that_trains_alone(tmp_path: Path):
    """Whatever trains is resumed, also where not all experts do."""

    def run(resume: str | None) -> Any:
        model = mixture(**SETTINGS)
        set_trainable(model, model.xlora_experts[1], True)
        hugging_face(model, tmp_path, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume)
        return model

    whole, again = run(None), run(str(tmp_path / "checkpoint-2"))
    assert same(whole.state_dict(), again.state_dict())
    assert not same(parts(whole)["experts"], parts(mixture(**SETTINGS))["experts"])


# -- gradients -----------------------------------------------------------------------------------------------


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def wanted() -> dict[str, Tensor]:
    """The gradients of the router and the experts, without any checkpointing."""
    model = mixture(layerwise_scalings=True, use_trainable_adapters=True).train()
    model(tokens(), labels=tokens()).loss.backward()
    check_gradients(model)
    assert gradients(model).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    return gradients(model)


def checkpointed(model: Any, **options: Any) -> None:
    """Turn on transformers' own activation checkpointing, by its name of today or yesterday."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_transformers_checkpointing_gives_the_same_gradients(wanted: dict[str, Tensor]):
    model = mixture(layerwise_scalings=True, use_trainable_adapters=True).train()
    checkpointed(model, use_reentrant=False)
    loss = model(tokens(), labels=tokens()).loss
    with route(model, "law"):  # whatever is current when the layers are replayed
        loss.backward()
    close(gradients(model), wanted)


def test_a_checkpoint_around_the_whole_model_replays_what_its_forward_was(wanted: dict[str, Tensor]):
    model = mixture(layerwise_scalings=True, use_trainable_adapters=True).train()

    def loss() -> Tensor:
        return checkpoint(lambda ids: model(ids, labels=ids).loss, tokens(), use_reentrant=False)

    mixed = loss()
    with model.disable():
        mixed.backward()
    close(gradients(model), wanted)
    model.zero_grad()
    model.get_input_embeddings().weight.requires_grad_(True)
    with model.disable():
        base = loss()
    base.backward()
    assert gradients(model).keys() == {"model.embed_tokens.weight"}
    plain = llama().train()
    plain(tokens(), labels=tokens()).loss.backward()
    torch.testing.assert_close(
        model.get_input_embeddings().weight.grad, plain.get_input_embeddings().weight.grad
    )


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad=True"
)  # what torch has to say about it
def test_reentrant_checkpointing_is_refused_and_never_silent():
    model = mixture().train()
    checkpointed(model, use_reentrant=True)
    with pytest.raises(
        RouteError, match="'model.layers.0.self_attn.q_proj' runs without gradient.*use_reentrant=False"
    ):
        model(tokens(), labels=tokens())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, mixture()(tokens()).logits)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_window_of_batches_is_one_batch(steps: int):
    """Any number of micro-batches to a step trains the same: 6 batches of 4, or 2 of 12."""

    def trained(size: int, accumulation: int) -> Any:
        model = mixture(layerwise_scalings=True, use_trainable_adapters=True).double()
        sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        engine = Engine(model, sgd, plugins=[], device="cpu", gradient_accumulation_steps=accumulation)
        for _ in engine.train(loader(size), num_epochs=1):
            engine.auto_update()
        return model.state_dict()

    whole, split = trained(4 * steps, 1), trained(4, steps)
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=1e-7)


def test_transformers_counts_the_tokens_of_a_window(tmp_path: Path):
    """With micro-batches of different numbers of labels, a window's loss is the mean over its tokens."""

    def trained(folder: str, size: int, accumulation: int) -> Any:
        model = mixture(layerwise_scalings=True).double()
        given = rows(8)
        for k, row in enumerate(given):
            row["labels"] = row["labels"].clone()
            row["labels"][: k % 8] = -100
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = hugging_face(
            model,
            tmp_path / folder,
            **options,
            save_strategy="no",
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train_dataset = given
        trainer.train()
        return model.state_dict()

    whole, split = trained("whole", 8, 1), trained("split", 2, 4)
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=0, atol=1e-10)
    assert not torch.equal(
        whole["xlora_classifier.layers.0.weight"],
        mixture(layerwise_scalings=True).double().state_dict()["xlora_classifier.layers.0.weight"],
    )


# -- precision -----------------------------------------------------------------------------------------------


def test_the_classifier_of_a_bfloat16_model_is_float32():
    model = mixture(llama().bfloat16(), layerwise_scalings=True, use_trainable_adapters=True).train()
    assert {p.dtype for p in model.xlora_classifier.parameters()} == {torch.float32}
    output = model(tokens(), labels=tokens())
    assert output.logits.dtype == torch.bfloat16
    assert model.get_latest_scalings().dtype == torch.float32
    output.loss.backward()
    assert all(
        p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad
    )
    exact = mixture(layerwise_scalings=True)
    exact(tokens())
    torch.testing.assert_close(model.get_latest_scalings(), exact.get_latest_scalings(), rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_classifier_is_exact_under_autocast(dtype: torch.dtype):
    model = mixture(layerwise_scalings=True).train()
    hidden = torch.randn(2, 5, 32)
    exact = model.xlora_classifier(hidden, model.xlora_config)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model.xlora_classifier(hidden, model.xlora_config), exact)
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    plain = mixture(layerwise_scalings=True).train()
    plain(tokens(), labels=tokens()).loss.backward()
    mine, theirs = (m.xlora_classifier.layers[0].weight.grad for m in (model, plain))
    assert mine.dtype == torch.float32
    assert (mine - theirs).norm() < 0.2 * theirs.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_engine_trains_a_mixture_in_mixed_precision(precision: str):
    model = mixture(**SETTINGS)
    batch = next(iter(loader(24)))
    before = model.eval()(**batch).loss.item()
    engine = Engine(model, optimizer(model), plugins=[], device="cpu", mixed_precision=precision)
    for _ in engine.train(loader(), num_epochs=2):
        engine.auto_update()
    assert model.eval()(**batch).loss.item() < before - 0.1

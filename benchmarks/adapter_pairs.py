"""The models that `adapters.py` times: one Llama with random weights, adapted by us and by PEFT.

Both start from the same base and the same factors (ours are copied into PEFT's, B and m moved off their
starting values, so that no product is with zeros) and must give the same logits and gradients before anything is timed.
PEFT runs as its users run it: `get_peft_model`, all linear layers, its default float32 adapters on a bf16 base.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, TaskOptimizers, adapter_parameters, inject, per_task_loss, route
from orbit.adapter.lora import add_product_

RANK, ALPHA = 16, 32
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # how far two ways to compute the same may lie apart


@dataclass(frozen=True)
class Shape:
    """Of the model and of a training batch."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 8192
    intermediate: int = 1376
    heads: int = 8
    batch: int = 4
    length: int = 256

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The frozen base, always the same one."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=max(512, self.length),
            attn_implementation="sdpa",
            use_cache=False,
        )
        return LlamaForCausalLM(config).to(device, dtype).requires_grad_(False).train()

    def tokens(self, device: str, rows: int | None = None, length: int | None = None) -> Tensor:
        noise = torch.Generator().manual_seed(1)
        size = (rows or self.batch, length or self.length)
        return torch.randint(self.vocabulary, size, generator=noise).to(device)


class Training:
    """A model, its optimizer, and one step of it as a call that returns the loss."""

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.optimizer = torch.optim.AdamW(list(parameters), lr=1e-4, fused=True)

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Together:
    """One step of several tasks at once on our side: each has its own rows of the batch and its own optimizer."""

    def __init__(self, base: nn.Module, alone: Sequence[Training], tokens: Tensor) -> None:
        self.names = [f"task{k}" for k in range(len(alone))]
        self.model, self.tokens = ours(base, self.names), tokens
        self.rows = [name for name in self.names for _ in range(len(tokens) // len(alone))]
        with torch.no_grad():  # each starts where its run alone stands
            for name, training in zip(self.names, alone, strict=True):
                now = dict(training.model.named_parameters())
                for key, parameter in adapter_parameters(self.model, name).items():
                    parameter.copy_(now[key.replace(f".{name}.", ".default.")])
        self.optimizer = TaskOptimizers(
            {
                name: torch.optim.AdamW(
                    list(adapter_parameters(self.model, name).values()), lr=1e-4, fused=True
                )
                for name in self.names
            }
        )

    def __call__(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.tokens, task=self.rows).logits
        expected = self.tokens[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), expected.flatten(), reduction="none")
        loss = per_task_loss(losses.view_as(expected), self.rows)  # a step follows every batch
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach() / len(self.names)


@dataclass(frozen=True)
class Serving:
    """Forwards of a batch with a task for every row, under one route, as `generate` makes them."""

    owner: nn.Module  # which knows the tasks
    model: nn.Module  # whose forward is called
    tokens: Tensor
    rows: Sequence[str | None]
    forwards: int

    def __call__(self) -> Tensor:
        with torch.no_grad(), self.routed():
            for _ in range(self.forwards):
                logits: Tensor = self.model(input_ids=self.tokens).logits
        return logits

    def routed(self) -> AbstractContextManager[None]:
        return route(self.owner, self.rows)


class PeftServing(Serving):
    """The same with what PEFT's own `generate` does with `adapter_names=`."""

    def routed(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.owner._enable_peft_forward_hooks(adapter_names=self.rows)  # type: ignore[operator]
        return context


@dataclass(frozen=True)
class InTurn:
    """A step of each of several trainings."""

    trainings: Sequence[Training]

    def __call__(self) -> None:
        for training in self.trainings:
            training()


class Frozen:
    """Forward and backward of the base alone: nothing trains, and the embeddings' output asks for a gradient."""

    def __init__(self, base: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = copy.deepcopy(base), tokens
        self.model.enable_input_require_grads()  # type: ignore[operator]

    def __call__(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        return loss.detach()


class Products:
    """The products by A and B alone, of every linear layer but the head, which no adapter can do without.

    One batched product for `groups` tasks, each with its part of the tokens, in the layout that was found the fastest
    (`lora.py`), on operands that lie ready: no optimizer, no module, no graph. With `backward` the six of a training
    step, else the two of a forward.
    """

    def __init__(self, base: nn.Module, tokens: int, groups: int, *, backward: bool) -> None:
        head = base.get_output_embeddings()  # type: ignore[operator]
        linear = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head]
        dtype, device = linear[0].weight.dtype, linear[0].weight.device
        noise = torch.Generator().manual_seed(3)

        def operand(*shape: int) -> Tensor:
            made = torch.randn(groups, *shape, generator=noise).to(device, dtype)
            return made if groups > 1 else made[0]  # one product is faster than a batch of one

        each = tokens // groups
        self.layers = [(layer.in_features, layer.out_features) for layer in linear]
        self.x = {n: operand(each, n) for pair in self.layers for n in pair}
        self.y = {n: operand(each, n) for pair in self.layers for n in pair}
        # Every layer has factors of its own, which must come from memory; x and y were written just before.
        self.factors = [(operand(RANK, wide), operand(RANK, out)) for wide, out in self.layers]
        self.backward = backward

    def __call__(self) -> None:
        for (wide, out), (A, B) in zip(self.layers, self.factors, strict=True):
            x, y = self.x[wide], self.y[out]
            p = A @ x.mT
            add_product_(y, p.mT, B)
            if self.backward:
                dx, dy = self.y[wide], self.x[out]
                e = B @ dy.mT
                torch.matmul(p, dy)
                add_product_(dx, e.mT, A)
                torch.matmul(e, x)


def ours(base: nn.Module, tasks: Sequence[str] = ("default",), **kind: Any) -> nn.Module:
    """A copy of the base with our adapters, whose values are as if they had been trained."""
    model = copy.deepcopy(base)
    for task in tasks:
        inject(model, AdapterConfig(**{"r": RANK, "alpha": ALPHA, **kind}), task)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_A" not in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise).to(parameter))
    return model


def pefts(
    base: nn.Module, mine: nn.Module, tasks: Sequence[str] = ("default",), *, dora: bool = False
) -> nn.Module:
    """A copy of the base with PEFT's adapters, whose values are ours."""
    import peft

    def config() -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora)

    model = peft.get_peft_model(copy.deepcopy(base), config(), tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, config())
    state = {
        "base_model.model." + name.replace("lora_magnitude.", "lora_magnitude_vector."): parameter
        for name, parameter in adapter_parameters(mine).items()
    }
    left = [name for name in model.load_state_dict(state, strict=False).missing_keys if "lora_" in name]
    assert not left, f"PEFT has adapters that ours has not: {left[:3]}"
    result: nn.Module = model
    return result


def check_same(mine: Tensor, theirs: Tensor, what: str, *, rtol: float) -> None:
    """AssertionError unless ‖ours − PEFT's‖ is at most rtol times ‖PEFT's‖."""
    mine, theirs = mine.detach().float(), theirs.detach().float()
    error = ((mine - theirs).norm() / theirs.norm()).item()
    assert error < rtol, (
        f"{what}: ours and PEFT's differ by {error:.1e} of their size, at most {rtol} is allowed"
    )


def training_pair(base: nn.Module, tokens: Tensor, *, dora: bool = False) -> tuple[Training, Training]:
    """Ours and PEFT's, after two steps of each that were found the same."""
    mine = ours(base, dora=dora)
    theirs = pefts(base, mine, dora=dora)
    pair = (
        Training(mine, adapter_parameters(mine).values(), tokens),
        Training(theirs, [p for p in theirs.parameters() if p.requires_grad], tokens),
    )
    counts = [sum(p.numel() for p in t.optimizer.param_groups[0]["params"]) for t in pair]
    assert counts[0] == counts[1], f"ours trains {counts[0]} numbers and PEFT {counts[1]}"
    check_training(*pair, "DoRA" if dora else "LoRA")
    return pair


def check_training(mine: Training, theirs: Training, what: str) -> None:
    """AssertionError unless two trainings have the same logits and the same gradients, and go on to the same."""
    rtol = ROUNDING[mine.model.dtype]  # type: ignore[index]
    for step in range(2):
        with torch.no_grad():
            logits, expected = (t.model(input_ids=t.tokens).logits for t in (mine, theirs))
        check_same(logits, expected, f"{what} logits before step {step}", rtol=rtol)
        for training in (mine, theirs):
            training.loss().backward()
        check_same(gradient(mine), gradient(theirs), f"{what} gradient of step {step}", rtol=rtol)
        for training in (mine, theirs):
            training.optimizer.step()
            training.optimizer.zero_grad()


def gradient(training: Training) -> Tensor:
    """All gradients end to end, in the order of our names."""
    found = {
        name.removeprefix("base_model.model.").replace("lora_magnitude_vector.", "lora_magnitude."): p.grad
        for name, p in training.model.named_parameters()
    }
    return torch.cat([grad.flatten().float() for _, grad in sorted(found.items()) if grad is not None])

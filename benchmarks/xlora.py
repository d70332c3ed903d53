"""X-LoRA against PEFT's: `make bench-xlora`, or `python -m benchmarks.xlora [--device cuda] [--out table.md]`.

    forward   inference: both passes and the classifier
    step      a training step of the classifier: forward, backward, fused AdamW; the experts are frozen
    memory    peak of such a step above what lay there before it
    generate  greedily, ours with its two caches and PEFT's, which has none; and ours over our own one-task generation

Each for 4 and 8 experts of rank 8 on all linear layers, in fp32 (with bars) and bf16, and beside it the least that any
mixture takes here, which runs the frozen model twice: in the scaling pass without its head, in the main pass with it.
Both sides have the same experts and classifier (depth 1, PEFT's default settings otherwise), and give the same logits,
gradients and tokens before anything is timed. Every figure is a ratio, ours over PEFT's, taken as `measuring.py` says.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.adapter_pairs import ROUNDING, Frozen, Shape, Training, check_same, ours
from benchmarks.measuring import (
    DTYPES,
    Groups,
    Line,
    Setting,
    measure,
    mebibytes,
    median_ratio,
    peak_bytes,
    timed,
)
from orbit.adapter import route, save
from orbit.xlora import mix, xLoRAConfig, xLoRAModel

EXPERT_RANK = 8
BARS = {  # by the number of experts
    "forward": {4: 0.60, 8: 0.46},
    "step": {4: 0.57, 8: 0.37},
    "memory": {4: 0.45, 8: 0.30},
    "generate": {4: 0.12, 8: 0.09},
    "over one task": {4: 2.1},
}
PROMPT, NEW = 64, 32


@dataclass(frozen=True)
class Pair:
    """One mixture on both sides, and their base."""

    base: nn.Module
    mine: xLoRAModel
    theirs: nn.Module

    @classmethod
    def of(cls, setting: Setting[Shape], experts: int, dtype: torch.dtype) -> Pair:
        """A mixture of experts with random values, the same on both sides, as was found before it is returned."""
        import peft

        names = [str(k) for k in range(experts)]  # as PEFT names them
        base = setting.shape.model(dtype, setting.device)
        mine = ours(base, names, r=EXPERT_RANK, alpha=2 * EXPERT_RANK)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                save(mine, Path(folder, name), name)
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=setting.shape.hidden,
                xlora_depth=1,
                adapters={name: str(Path(folder, name)) for name in names},
            )
            theirs = peft.get_peft_model(copy.deepcopy(base), config)
        mixture = mix(mine, names, xLoRAConfig(setting.shape.hidden))
        own = their_classifier(theirs)
        with torch.no_grad():
            for parameter, value in zip(mixture.xlora_classifier.parameters(), own.parameters(), strict=True):
                parameter.copy_(value)
        pair = cls(base, mixture, theirs)
        pair.check(setting)
        return pair

    def check(self, setting: Setting[Shape]) -> None:
        """AssertionError unless both sides have the same logits and the same gradients of the classifier."""
        rtol = ROUNDING[next(self.base.parameters()).dtype]
        us, them = self.trainings(setting)
        with torch.no_grad():
            logits, expected = (t.model(input_ids=t.tokens).logits for t in (us, them))
        check_same(logits, expected, "mixture's logits", rtol=rtol)
        grads = []
        for training in (us, them):
            training.loss().backward()
            grads.append(
                torch.cat([p.grad.flatten().float() for p in trained(training) if p.grad is not None])
            )
            training.optimizer.zero_grad()
        check_same(grads[0], grads[1], "classifier's gradient", rtol=rtol)

    def trainings(self, setting: Setting[Shape]) -> tuple[Training, Training]:
        """Both sides in train mode, and what steps them."""
        tokens = setting.shape.tokens(setting.device)
        return (
            Training(self.mine.train(), self.mine.xlora_classifier.parameters(), tokens),
            Training(self.theirs.train(), their_classifier(self.theirs).parameters(), tokens),
        )

    def name(self) -> str:
        dtype = next(self.base.parameters()).dtype
        kind = next(kind for kind, found in DTYPES.items() if found == dtype)
        return f"{len(self.mine.xlora_experts)} experts, {kind}"

    def bar(self, measure: str) -> float | None:
        exact = next(self.base.parameters()).dtype == torch.float32
        return BARS[measure].get(len(self.mine.xlora_experts)) if exact else None


def their_classifier(theirs: nn.Module) -> nn.Module:
    found = theirs.base_model.internal_xlora_classifier  # type: ignore[union-attr]
    assert isinstance(found, nn.Module)
    return found


def trained(training: Training) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = training.optimizer.param_groups[0]["params"]
    return parameters


def pairs(setting: Setting[Shape]) -> Iterator[Pair]:
    for dtype in DTYPES.values():
        for experts in (4, 8):
            yield Pair.of(setting, experts, dtype)


def logits_of(model: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens).logits
        return logits

    return run


def least(passes: list[float], scaling: list[float], theirs: list[float]) -> Line:
    both = [a + b for a, b in zip(passes, scaling, strict=True)]
    return timed("… the least: the frozen model twice, once without its head", both, theirs, None)


def scaling_pass(base: nn.Module, tokens: Tensor) -> Callable[[], Tensor]:
    """The frozen decoder alone."""

    def run() -> Tensor:
        with torch.no_grad():
            hidden: Tensor = base.get_decoder()(input_ids=tokens).last_hidden_state  # type: ignore[operator]
        return hidden

    return run


def forward(setting: Setting[Shape]) -> Iterator[Line]:
    tokens = setting.shape.tokens(setting.device)
    for pair in pairs(setting):
        t = setting.times(
            {
                "us": logits_of(pair.mine.eval(), tokens),
                "them": logits_of(pair.theirs.eval(), tokens),
                "main": logits_of(pair.base, tokens),
                "scaling": scaling_pass(pair.base, tokens),
            }
        )
        yield timed(f"forward, {pair.name()}", t["us"], t["them"], pair.bar("forward"))
        yield least(t["main"], t["scaling"], t["them"])


def step(setting: Setting[Shape]) -> Iterator[Line]:
    for pair in pairs(setting):
        us, them = pair.trainings(setting)
        t = setting.times(
            {
                "us": us,
                "them": them,
                "main": Frozen(pair.base, us.tokens),
                "scaling": scaling_pass(pair.base, us.tokens),
            }
        )
        yield timed(f"classifier's training step, {pair.name()}", t["us"], t["them"], pair.bar("step"))
        yield least(t["main"], t["scaling"], t["them"])


def memory(setting: Setting[Shape]) -> Iterator[Line]:
    for pair in pairs(setting):
        us, them = pair.trainings(setting)
        frozen = Frozen(pair.base, us.tokens)
        for run in (us, them, frozen):
            run()  # so that optimizers have their states
        peaks = [peak_bytes(run, setting.device) for run in (us, them, frozen)]
        yield mebibytes(f"its peak memory above the model, {pair.name()}", peaks[:2], pair.bar("memory"))
        yield mebibytes("… the least: forward and backward of the frozen model", [peaks[2], peaks[1]], None)


def generated(model: nn.Module, prompt: Tensor, task: str | None = None) -> Callable[[], Tensor]:
    """Greedy generation, by the mixture or by one of its tasks."""

    def run() -> Tensor:
        with torch.no_grad(), nullcontext() if task is None else route(model, task):
            tokens: Tensor = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                use_cache=True,  # PEFT's turns it off
                pad_token_id=0,
            )
        return tokens

    return run


def generate(setting: Setting[Shape]) -> Iterator[Line]:
    prompt = setting.shape.tokens(setting.device, length=PROMPT)
    for pair in pairs(setting):
        mine, theirs = pair.mine.eval(), pair.theirs.eval()
        same = (generated(mine, prompt)() == generated(theirs, prompt)()).float().mean().item()
        # In bf16 one near tie decides differently and takes all that follows with it.
        exact = next(pair.base.parameters()).dtype == torch.float32
        assert same == 1 or not exact, f"{1 - same:.1%} of the tokens differ from PEFT's"
        t = setting.times(
            {
                "us": generated(mine, prompt),
                "them": generated(theirs, prompt),
                "one": generated(mine, prompt, task="0"),
            }
        )
        what = f"generate {NEW} tokens from {len(prompt)}x{PROMPT}, {pair.name()}"
        yield timed(what, t["us"], t["them"], pair.bar("generate"))
        over = median_ratio(t["us"], t["one"])
        detail = f"one task {statistics.median(t['one']) * 1e3:.4g} ms"
        yield Line("… over our own with one task", over, pair.bar("over one task"), detail)


GROUPS: Groups[Shape] = {"forward": forward, "step": step, "memory": memory, "generate": generate}


def main(argv: list[str] | None = None) -> None:
    measure("python -m benchmarks.xlora", __doc__.split("\n")[0], GROUPS, Shape, argv)


if __name__ == "__main__":
    main()

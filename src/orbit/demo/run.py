"""`orbit demo`: fine-tune a causal LM on the demo's facts with LoRA, and show what changed.

    measure → train (Engine + LoRA, loss on the answers only) → measure → save → compare with PEFT → report

Every figure is taken on the model as it is in memory, in the precision it trains in; only the comparison with
PEFT loads the saved adapter twice, here and there, in fp32. `examples/01_finetune.py` is the same training
without the report.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from orbit import adapter
from orbit.core.extras import need
from orbit.core.rng import seed_everything
from orbit.core.runtime import autocast, resolve_device
from orbit.data import SFTCollator, build_sft, encode, render, train_sft
from orbit.demo.facts import Fact, load_facts, load_prose
from orbit.demo.precision import fastest_dtype
from orbit.demo.report import print_report
from orbit.demo.score import answers, exact_match, perplexity
from orbit.demo.smollm2 import resolve_model
from orbit.engine import Engine
from orbit.plugin.lora import LoRA
from orbit.plugin.progress import ProgressHook


@dataclass(frozen=True)
class Recipe:
    """How the demo trains. Found by a search on SmolLM2 that looked at all three figures (docs/log.md)."""

    epochs: int = 3
    batch_size: int = 4
    lr: float = 1e-3
    warmup: float = 0.1
    r: int = 16
    alpha: int = 32
    seed: int = 42


@dataclass(frozen=True)
class Measured:
    """Replies and figures at one moment: `trained` and `unseen` are exact match in [0, 1] by wording."""

    replies: list[str]
    paraphrased: list[str]
    trained: float
    unseen: float
    perplexity: float


@dataclass(frozen=True)
class Report:
    """What one run of the demo came to. `difference` is max |Δ logit| to PEFT, None without PEFT."""

    model: str
    facts: list[Fact]
    before: Measured
    after: Measured
    adapter: Path
    difference: float | None
    training_seconds: float
    evaluation_seconds: float

    @property
    def chat(self) -> str:
        """The command that talks to the result."""
        return f"orbit chat --model {shlex.quote(self.model)} --adapter {shlex.quote(str(self.adapter))}"


def run_demo(
    model: str = "smollm2",
    out: str | Path = "runs/demo",
    facts: str | Path | None = None,
    recipe: Recipe = Recipe(),
    device: str | None = None,
    console: Console | None = None,
) -> Report:
    """Fine-tune `model` on the facts and report.

    Args:
        model: "smollm2", or the folder or hub name of any Hugging Face causal LM.
        out: the adapter goes to `out`/adapter, the figures to `out`/report.json.
        facts: a jsonl of your own (`orbit.demo.facts.Fact`); default: the demo's.
        device: default: CUDA when there is one, else the CPU.

    Raises:
        ModelNotInstalledError: "smollm2" and its packages are missing.
        FactsError: the facts file is not one.
        MissingExtraError: transformers is not installed.
        OSError: no such model, or `out` cannot be made.
    """
    need("llm", "transformers", "jinja2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    console = Console() if console is None else console
    seed_everything(recipe.seed)
    known, prose, place = load_facts(facts), load_prose(), resolve_device(device)
    folder, dtype = resolve_model(model), fastest_dtype(place)
    Path(out).mkdir(parents=True, exist_ok=True)  # where that fails, before the training
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place)
    precision = "bf16" if dtype is torch.bfloat16 else None
    console.print(
        f"{model}: {network.num_parameters() / 1e6:.0f}M parameters in {dtype} on {place.type}; "
        f"{len(known)} facts",
        highlight=False,
    )

    def measure() -> tuple[Measured, float]:
        began = time.perf_counter()
        with autocast(place, dtype if precision else None):
            return _measure(network, tokenizer, known, prose), time.perf_counter() - began

    before, measuring = measure()
    began = time.perf_counter()
    finetune(network, tokenizer, known, recipe, precision, console)
    training = time.perf_counter() - began
    after, measuring_again = measure()

    path = Path(out) / "adapter"
    adapter.save(network, path)
    report = Report(
        model=model,
        facts=known,
        before=before,
        after=after,
        adapter=path,
        difference=_difference_to_peft(folder, path, tokenizer, known[:8]),
        training_seconds=training,
        evaluation_seconds=measuring + measuring_again,
    )
    _write(report, recipe, Path(out) / "report.json")
    print_report(report, console)
    return report


def finetune(
    model: Any, tokenizer: Any, facts: Sequence[Fact], recipe: Recipe, precision: str | None, console: Console
) -> Engine:
    """Train a LoRA over `feed_forward(model)` on the taught wordings; no paraphrase is seen."""
    samples = [build_sft(wording, fact.answer, tokenizer) for fact in facts for wording in fact.taught]
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=recipe.batch_size,
        shuffle=True,
        collate_fn=SFTCollator(tokenizer),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    steps = recipe.epochs * len(loader)
    engine = Engine(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.lr, steps, pct_start=recipe.warmup, cycle_momentum=False
        ),
        plugins=[
            LoRA(target_names=feed_forward(model), r=recipe.r, alpha=recipe.alpha),
            ProgressHook(interval=max(1, steps // 20)),
        ],
        mixed_precision=precision,
        grad_clip_norm=1.0,
        device=model.device,
        console=console,
    )
    for _ in engine.train(loader, num_epochs=recipe.epochs):
        train_sft(engine)
    return engine


def feed_forward(model: nn.Module) -> list[str] | None:
    """The targets of the demo's LoRA: the blocks named "mlp" where there are such, else None, all linear layers.

    Facts go into feed-forward blocks with a quarter of the harm to other text that adapting attention too does:
    on SmolLM2, at equal exact match, perplexity rose by 1.5 % against 6 %.
    """
    blocks = (module for path, module in model.named_modules() if path.rpartition(".")[2] == "mlp")
    return (
        ["mlp"]
        if any(isinstance(layer, nn.Linear) for block in blocks for layer in block.modules())
        else None
    )


def _measure(model: Any, tokenizer: Any, facts: Sequence[Fact], prose: str) -> Measured:
    wanted = [fact.answer for fact in facts]
    room = 2 + max(len(encode(tokenizer, answer)) for answer in wanted)  # a longer reply cannot match
    replies, paraphrased = (
        answers(model, tokenizer, [getattr(fact, wording) for fact in facts], max_new_tokens=room)
        for wording in ("question", "paraphrase")
    )
    return Measured(
        replies,
        paraphrased,
        exact_match(replies, wanted),
        exact_match(paraphrased, wanted),
        perplexity(model, tokenizer, prose),
    )


def _difference_to_peft(folder: str, path: Path, tokenizer: Any, facts: Sequence[Fact]) -> float | None:
    """Largest |Δ logit| between the saved adapter loaded here and loaded by PEFT, both in fp32."""
    if importlib.util.find_spec("peft") is None:
        return None
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter.load(ours, path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks for what transformers 5.23 renamed
        theirs = PeftModel.from_pretrained(base, str(path)).eval()
    largest = 0.0
    for fact in facts:
        text = render(tokenizer, [{"role": "user", "content": fact.question}], add_generation_prompt=True)
        ids = torch.tensor([encode(tokenizer, text)])
        with torch.inference_mode():
            difference = ours(input_ids=ids).logits - theirs(input_ids=ids).logits
        largest = max(largest, difference.abs().max().item())
    return largest


def _write(report: Report, recipe: Recipe, path: Path) -> None:
    figures = {
        "model": report.model,
        "recipe": asdict(recipe),
        "before": asdict(report.before),
        "after": asdict(report.after),
        "max_logit_difference_to_peft": report.difference,
        "training_seconds": report.training_seconds,
        "evaluation_seconds": report.evaluation_seconds,
    }
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")

"""A mixture of LoRA experts (X-LoRA): three experts, each taught another kind of text, and a router that learns which to wake.

python examples/03_mixture.py                  # SmolLM2-135M-Instruct
python examples/03_mixture.py path/to/model    # any Hugging Face causal LM

1. Three LoRA tasks learn from mixed batches: each row trains the expert of its own kind, over one forward of the base.
2. A classifier learns, from the language-model loss alone, how much of each expert every token gets. It is
   never told which kind a text is.
3. Held-out texts (other countries, other topics, other chapters): is the expert with the largest scaling the text's own,
   and what is the perplexity of router, of each expert alone, and of the base?

The texts are in examples/data, whose README says where they come from.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orbit import adapter, xlora
from orbit.data import SFTCollator
from orbit.demo import resolve_model
from orbit.engine import Engine
from orbit.plugin import ProgressHook
from orbit.utils import seed_everything

KINDS = ("facts", "chat", "verse")
EXPERT_EPOCHS, EXPERT_LR, BATCH = 1, 1e-3, 12
ROUTER_STEPS, ROUTER_LR, ROUTER_BATCH = 60, 3e-3, 24
TOKENS = 48  # longer texts lose their end
OUT = Path("runs/mixture")

seed_everything(42)
folder = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
pad = SFTCollator(tokenizer)


def texts(split):
    """[(text, kind)] of "train" or "held out"."""
    lines = [
        (json.loads(line), kind)
        for kind in KINDS
        for line in (Path(__file__).parent / f"data/{kind}.jsonl").read_text("utf-8").splitlines()
    ]
    return [(line["text"], kind) for line, kind in lines if line["split"] == split]


def collate(some):
    """A batch for the model, and the kind of each row."""
    ids = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text, _ in some]
    return pad([{"input_ids": row, "labels": row} for row in ids]), [kind for _, kind in some]


def token_losses(batch, **chosen):
    """−log p of every token but each row's first (rows, positions), and which of them are no padding."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits, labels = model(**inputs, use_cache=False, **chosen).logits[:, :-1], batch["labels"][:, 1:]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(
        labels
    ), labels >= 0


def stage(text, clock=[time.time()]):
    now = time.time()
    print(f"[{now - clock[0]:.0f} s] {text}", flush=True)


# 1. The experts, in mixed batches.
for kind in KINDS:
    report = adapter.inject(
        model,
        adapter.AdapterConfig(r=8, alpha=16, targets=("q_proj", "v_proj", "down_proj"), layers=range(15, 30)),
        kind,
    )
optimizer = adapter.TaskOptimizers(
    {
        kind: torch.optim.AdamW(adapter.adapter_parameters(model, kind).values(), lr=EXPERT_LR)
        for kind in KINDS
    },
    clip=1.0,
)


def learn(engine, batch, kinds):
    losses, counted = token_losses(batch, task=kinds)
    return optimizer.outcome(losses, kinds, counted)


stage("training")
train = DataLoader(texts("train"), batch_size=BATCH, shuffle=True, collate_fn=collate)
engine = Engine(model, optimizer, forward_step=learn, plugins=[ProgressHook(20)], device="cpu")
engine.run(train, num_epochs=EXPERT_EPOCHS)
for kind in KINDS:
    adapter.save(model, OUT / kind, kind)
stage("experts trained")

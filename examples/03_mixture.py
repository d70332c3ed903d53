"""A mixture of LoRA experts: three of them, each taught another kind of text, and a router that learns which to wake.

python examples/03_mixture.py                  # SmolLM2-135M-Instruct
python examples/03_mixture.py path/to/model    # any Hugging Face causal LM

1. Three LoRA tasks learn from mixed batches: a row trains the expert of its own kind, over one forward of the base.
2. A classifier learns how much of each expert every token gets at every layer, from the language-model loss alone. It
   is never told of what kind a text is.
3. On texts held out (other countries, other topics, other chapters): is the expert with the largest scaling the text's
   own? And what is the perplexity of the router, of each expert alone, of the base?

The texts are in examples/data, whose README says where they come from.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orbit import adapter, xlora
from orbit.core import Outcome
from orbit.data import SFTCollator
from orbit.demo import resolve_model
from orbit.demo.precision import fastest_dtype
from orbit.demo.threads import PickThreads
from orbit.engine import Engine
from orbit.plugin import ProgressHook
from orbit.utils import seed_everything

KINDS = ("facts", "chat", "verse")
EXPERT = {"epochs": 1, "batch": 12, "lr": 1e-3}
ROUTER = {"steps": 60, "batch": 24, "lr": 1e-3}
TOKENS = 32  # longer texts lose their end
OUT = Path("runs/mixture")

seed_everything(42)
folder = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
dtype = fastest_dtype(torch.device("cpu"))
precision = "bf16" if dtype is torch.bfloat16 else None
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
pad = SFTCollator(tokenizer)


def texts(split):
    """[(text, kind)]"""
    data = Path(__file__).parent / "data"
    lines = [
        (json.loads(line), kind) for kind in KINDS for line in (data / f"{kind}.jsonl").open(encoding="utf-8")
    ]
    return [(line["text"], kind) for line, kind in lines if line["split"] == split]


def collate(some):
    """The model's inputs, and the kind of each row."""
    rows = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text, _ in some]
    return pad([{"input_ids": ids, "labels": ids} for ids in rows]), [kind for _, kind in some]


def token_losses(model, batch, **chosen):
    """−log p of all tokens but each row's first (rows, positions), and which of them are no padding."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits, labels = model(**inputs, use_cache=False, **chosen).logits[:, :-1], batch["labels"][:, 1:]
    losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses, labels != -100


def train(optimizer, loss, batch, steps):
    """`loss(engine, inputs, kinds)` on batches of all kinds, at a learning rate that falls to 0."""
    loader = DataLoader(texts("train"), batch_size=batch, shuffle=True, collate_fn=collate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    plugins = [ProgressHook(interval=20), PickThreads(torch.get_num_threads())]
    engine = Engine(
        model, optimizer, None, decay, plugins, precision, forward_step=loss, device="cpu"
    )
    for _ in engine.train(loader, num_epochs=steps, max_steps=steps):
        engine.auto_update()

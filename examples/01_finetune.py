"""Teach a language model facts with LoRA: what `orbit demo` does, written with Engine.

python examples/01_finetune.py                  # SmolLM2-135M-Instruct
python examples/01_finetune.py path/to/model    # any Hugging Face causal LM
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from orbit import adapter
from orbit.data import SFTCollator, build_sft, train_sft
from orbit.demo import answers, exact_match, load_facts, resolve_model
from orbit.engine import Engine
from orbit.plugin import LoRA, ProgressHook
from orbit.utils import seed_everything

EPOCHS, BATCH, LR, OUT = 3, 4, 8e-4, "runs/finetune"

seed_everything(42)
folder = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
facts = load_facts()
wanted = [fact.answer for fact in facts]


def score() -> str:
    """Exact match on the trained questions, and on paraphrases that training never sees."""
    trained = exact_match(answers(model, tokenizer, [fact.question for fact in facts]), wanted)
    unseen = exact_match(answers(model, tokenizer, [fact.paraphrase for fact in facts]), wanted)
    return f"exact match: {trained:.1%} trained wording, {unseen:.1%} unseen paraphrase"


print("before:", score())
samples = [build_sft(wording, fact.answer, tokenizer) for fact in facts for wording in fact.taught]
loader = DataLoader(samples, batch_size=BATCH, shuffle=True, collate_fn=SFTCollator(tokenizer))
optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
warm_then_cosine = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, LR, EPOCHS * len(loader), pct_start=0.1, cycle_momentum=False
)

engine = Engine(
    model,
    optimizer,
    scheduler=warm_then_cosine,
    plugins=[LoRA(target_names=["mlp"], r=16, alpha=32), ProgressHook(interval=20)],
    mixed_precision="bf16",
    grad_clip_norm=1.0,
)
for _ in engine.train(loader, num_epochs=EPOCHS):
    train_sft(engine)

adapter.save(model, OUT)  # in PEFT's format
print("after: ", score())
print(f"talk to it: orbit chat --model {folder} --adapter {OUT}")

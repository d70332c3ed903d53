"""A mixture of LoRA experts: three of them, each taught another kind of text, and a router that learns which to wake.

python examples/03_mixture.py                  # SmolLM2-135M-Instruct
python examples/03_mixture.py path/to/model    # any Hugging Face causal LM

1. Three LoRA tasks learn from mixed batches: a row trains the expert of its own kind, over one forward of the base.
2. A classifier learns how much of each expert every token gets, from the language-model loss alone. It is never told
   of what kind a text is.
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
from orbit.data import SFTCollator
from orbit.demo import resolve_model
from orbit.demo.precision import fastest_dtype
from orbit.demo.threads import PickThreads
from orbit.engine import Engine
from orbit.plugin import ProgressHook
from orbit.utils import seed_everything

KINDS = ("facts", "chat", "verse")
TOKENS = 32  # longer texts lose their end
OUT = Path("runs/mixture")

seed_everything(42)
folder = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
dtype = fastest_dtype(torch.device("cpu"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
pad = SFTCollator(tokenizer)
half = model.config.num_hidden_layers // 2
lines = [
    json.loads(line) | {"kind": kind}
    for kind in KINDS
    for line in (Path(__file__).parent / "data" / f"{kind}.jsonl").read_text("utf-8").splitlines()
]
training = [line for line in lines if line["split"] == "train"]
held_out = [line for line in lines if line["split"] == "held out"]


def collate(some):
    """The model's inputs, and the kind of each row."""
    rows = [tokenizer(line["text"], truncation=True, max_length=TOKENS)["input_ids"] for line in some]
    return pad([{"input_ids": ids, "labels": ids} for ids in rows]), [line["kind"] for line in some]


def token_losses(inputs, **chosen):
    """−log p of all tokens but each row's first (rows, positions), and which of them are no padding."""
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
    logits = model(ids, attention_mask=mask, use_cache=False, **chosen).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), labels, reduction="none"), labels != -100


def train(optimizer, loss, batch_size, epochs):
    """`loss(inputs, kinds)` on mixed batches, at a learning rate that falls to 0."""
    loader = DataLoader(training, batch_size, shuffle=True, collate_fn=collate)
    steps = epochs * len(loader)
    engine = Engine(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps),
        forward_step=lambda engine, inputs, kinds: loss(inputs, kinds),
        plugins=[ProgressHook(interval=20), PickThreads(torch.get_num_threads())],
        mixed_precision="bf16" if dtype is torch.bfloat16 else None,
        device="cpu",
    )
    engine.run(loader, num_epochs=epochs)


# 1. The experts.
for kind in KINDS:
    targets = ("q_proj", "v_proj", "down_proj")
    adapter.inject(
        model, adapter.AdapterConfig(r=8, alpha=16, targets=targets, layers=range(half, 2 * half)), kind
    )
experts = adapter.TaskOptimizers(
    {kind: torch.optim.AdamW(adapter.adapter_parameters(model, kind).values(), lr=1e-3) for kind in KINDS},
    clip=1.0,
)


def loss_of_experts(inputs, kinds):
    losses, counted = token_losses(inputs, task=kinds)
    return experts.outcome(losses, kinds, counted)


train(experts, loss_of_experts, batch_size=12, epochs=1)

# 2. The router. Everything but the classifier is frozen.
xlora.mix(model, KINDS, xlora.xLoRAConfig(model.config.hidden_size, xlora_depth=2, xlora_size=64))
model.print_trainable_parameters()


def loss_of_router(inputs, kinds):  # the kinds are not looked at
    losses, counted = token_losses(inputs)
    return (losses.sum(1) / counted.sum(1)).mean()  # every text weighs the same


train(
    torch.optim.AdamW(model.xlora_classifier.parameters(), lr=1e-3), loss_of_router, batch_size=24, epochs=1
)
model.save_pretrained(OUT)

# 3. What they learned.
model.eval()


@torch.inference_mode()
def measure(kind, **chosen):
    """The perplexity of the held-out texts of a kind, and where the router chose the experts that it woke."""
    texts = sorted((line for line in held_out if line["kind"] == kind), key=lambda line: len(line["text"]))
    total, tokens, woken = 0.0, 0, []
    for i in range(0, len(texts), 20):
        inputs, _ = collate(texts[i : i + 20])
        losses, counted = token_losses(inputs, **chosen)
        total, tokens = total + float(losses.sum()), tokens + int(counted.sum())
        if not chosen:
            scalings = model.get_latest_scalings() * inputs["attention_mask"][:, :, None, None]
            woken += [KINDS[k] for k in scalings.sum((1, 2)).argmax(-1)]  # over tokens and layers
    return math.exp(total / tokens), woken


def show(name, figures, form):
    print(
        f"{name:<16}" + "".join(f"{figure:>10{form}}" for figure in [*figures, sum(figures) / len(figures)])
    )


print(
    f"\n{len(held_out)} texts held out\n{'perplexity':<16}"
    + "".join(f"{kind:>10}" for kind in (*KINDS, "mean"))
)
for name, chosen in {"base": None, **{f"{kind} alone": kind for kind in KINDS}}.items():
    show(name, [measure(kind, task=chosen)[0] for kind in KINDS], ".2f")
routed = [measure(kind) for kind in KINDS]
show("router", [perplexity for perplexity, _ in routed], ".2f")
show(
    "router accuracy",
    [woken.count(kind) / len(woken) for kind, (_, woken) in zip(KINDS, routed, strict=True)],
    ".1%",
)
print(xlora.expert_load(model, [collate(held_out[i : i + 20])[0] for i in range(0, len(held_out), 20)]))

text = "\n".join(next(line["text"] for line in held_out if line["kind"] == kind) for kind in KINDS)
scalings = xlora.Scalings.of(model, text, tokenizer)
print(f"see {scalings.plot(OUT / 'heatmap.png')} and {scalings.plot(OUT / 'heatmap.html')}")

"""`orbit eval`: a run is trained, measured against figures that are computed another way, and wrong uses are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orbit import adapter, cli
from orbit.data import QADataset
from orbit.demo.facts import paraphrases

TRAIN = [
    "train",
    "experiment=sft",
    "run_name=first",
    "trainer.args.max_steps=2",
    "trainer.args.disable_tqdm=true",
]


@pytest.fixture
def run(tiny_model: Path, elsewhere: Path) -> Path:
    assert cli.main([*TRAIN, f"model.model_args.pretrained_model_name_or_path={tiny_model}"]) == 0
    return Path("runs/sft/first")


def test_a_run_is_measured_as_transformers_measures_it(run: Path, tiny_model: Path, capsys) -> None:
    assert cli.main(["eval", f"run={run}", "max_new_tokens=4", "batch_size=16"]) == 0
    assert "rougeL" in capsys.readouterr().out
    found = json.loads((run / "eval" / "SUMMARY.json").read_text())["paraphrases"]
    assert list(found) == [
        "loss", "perplexity", "exact_match", "rouge1", "rouge2", "rougeL", "rougeL_recall",
    ]  # fmt: skip
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    adapter.load(model, run / "adapters" / "default")
    data = QADataset({"rows": paraphrases()}, {"apply_chat_template": True}, tokenizer)
    total = tokens = 0.0
    for item in data:
        labels = item["labels"][None]
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=item["input_ids"][None], labels=labels).loss) * count
        tokens += count
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    samples = json.loads((run / "eval" / "EVAL.json").read_text())["samples"]["paraphrases"]
    assert [one["index"] for one in samples["generate"]] == list(range(len(data)))
    for index in (0, 7):
        ids = samples["generate"][index]["prompt"]
        prompt = torch.tensor([tokenizer(ids, add_special_tokens=False)["input_ids"]])
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
        )
        said = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert samples["generate"][index]["text"] == said

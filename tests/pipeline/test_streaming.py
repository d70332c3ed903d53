"""A run over a stream: it says its number of steps, and is told what is wrong before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orbit.config import ConfigError
from orbit.pipeline import compose, train


def run(tiny_model: Path, folder: Path, *more: str) -> dict[str, float]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": "hello", "answer": "mali"}) + "\n" for _ in range(20)))
    overrides = [
        "experiment=sft",
        f"model.model_args.pretrained_model_name_or_path={tiny_model}",
        f"paths.train_output_dir={folder / 'run'}",
        "trainer.args.per_device_train_batch_size=4",
        "data.train.facts.shuffle=8",
        f"data.train.facts.args.hf_args={{path: '{path}', streaming: true, source: null}}",
        *more,
    ]
    return train(compose("train", overrides), "sft")


def test_a_run_over_a_stream(tiny_model: Path, tmp_path: Path) -> None:
    result = run(tiny_model, tmp_path, "trainer.args.max_steps=7")
    assert result["loss"] > 0
    assert (tmp_path / "run" / "done.json").exists()


def test_a_stream_has_no_length(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a stream, which has no length"):
        run(tiny_model, tmp_path)

"""`streaming: true` in a config: the same samples, read while they are used."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from orbit.core.components import ComponentError
from orbit.data.build import build_dataset
from orbit.data.collate import SFTCollator
from orbit.data.rows import DataError
from tests.tiny_llm import tiny_tokenizer

ROWS = [{"prompt": "hello", "answer": answer} for answer in ("mali", "bamako", "6", "march", "1957")]


def section(path, **more):
    args = {"hf_args": {"path": str(path), "columns": {"question": "prompt"}, "streaming": True}}
    return {"handler": "QADataset", "args": args, **more}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def build(section):
    return build_dataset("qa", section, {}, tiny_tokenizer())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_has_the_samples_of_all_rows(path, workers):
    streamed, whole = build(section(path)), section(path)
    whole["args"]["hf_args"]["streaming"] = False
    wanted = build(whole)
    assert isinstance(streamed, IterableDataset)
    loader = DataLoader(streamed, batch_size=None, num_workers=workers)
    found = sorted(loader, key=lambda sample: sample["labels"].tolist())
    assert len(found) == len(wanted)
    for sample, other in zip(found, sorted(wanted, key=lambda s: s["labels"].tolist()), strict=True):
        assert torch.equal(sample["labels"], other["labels"])
    batch = next(
        iter(DataLoader(build(section(path, shuffle=3)), 2, collate_fn=SFTCollator(tiny_tokenizer())))
    )
    assert batch["labels"].shape[0] == 2


def test_what_is_wrong_further_down_is_told_where_it_is(path):
    path.write_text(path.read_text() + '{"prompt": "hello", "answer": 3}\n')
    rows = iter(build(section(path)))
    with pytest.raises(DataError, match=r"rows\.jsonl from row 5, row 0: .*'answer' is 3"):
        list(rows)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"packing": 64}, ComponentError, "is a stream, which cannot be packed"),
        ({"shuffle": -1}, ValueError, "shuffle=-1"),
        ({"args": {"hf_args": {"rows": ROWS, "streaming": True}}}, DataError, "no column 'question'"),
        (
            {"args": {"hf_args": {"rows": ROWS}}, "shuffle": 3},
            ComponentError,
            "shuffle, which is for streams",
        ),
    ],
)
def test_what_is_wrong_is_told_before_the_run(path, change, error, why):
    with pytest.raises(error, match=why):
        build({**section(path), **change})

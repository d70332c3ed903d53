"""build_sft: what is supervised, what is refused."""

import pytest
import torch

from orbit.data.sft import MaskedSampleError, build_sft
from tests.tiny_llm import TEMPLATE, tiny_tokenizer


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["own template", "fallback"])
def test_only_answer_and_end_are_supervised(template):
    """Also though the end mark is the padding token."""
    tokenizer = tiny_tokenizer(template)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sample = build_sft("what is the capital of mali ?", "bamako", tokenizer)
    supervised = sample["labels"] != -100
    assert words(tokenizer, sample["labels"][supervised]) == ["bamako", "<end>"]
    assert torch.equal(sample["input_ids"][supervised], sample["labels"][supervised])
    assert sample["attention_mask"].all()
    assert {len(v) for v in sample.values()} == {len(sample["labels"])}
    assert {v.dtype for v in sample.values()} == {torch.int64}


def test_messages_and_pairs_are_the_same_conversation():
    tokenizer = tiny_tokenizer()
    pairs = [("hello", "mali"), ("what is the capital ?", "bamako")]
    messages = [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    one, two = build_sft(pairs, tokenizer=tokenizer), build_sft(messages, tokenizer=tokenizer)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert words(tokenizer, one["labels"][one["labels"] != -100]) == ["mali", "<end>", "bamako", "<end>"]


def test_a_role_of_another_name():
    tokenizer = tiny_tokenizer(TEMPLATE.replace("<start> assistant", "<start> model"), extra=("model",))
    sample = build_sft("hello", "mali", tokenizer, model_role="model")
    assert words(tokenizer, sample["labels"][sample["labels"] != -100]) == ["mali", "<end>"]


def test_padding_to_max_length_is_masked_by_position():
    tokenizer = tiny_tokenizer()
    short = build_sft("hello", "mali", tokenizer)
    n = len(short["input_ids"])
    padded = build_sft("hello", "mali", tokenizer, max_length=n + 3, padding=True, ignore_index=-1)
    assert padded["attention_mask"].tolist() == [1] * n + [0] * 3
    assert padded["labels"][n:].tolist() == [-1] * 3
    assert torch.equal(padded["labels"][:n], torch.where(short["labels"] == -100, -1, short["labels"]))


def test_too_long_loses_its_end():
    tokenizer = tiny_tokenizer()
    whole = build_sft("hello", "6 march 1957", tokenizer)
    cut = build_sft("hello", "6 march 1957", tokenizer, max_length=len(whole["input_ids"]) - 3)
    assert words(tokenizer, cut["labels"][cut["labels"] != -100]) == ["6", "march"]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])


@pytest.mark.parametrize(
    ("content", "settings", "why"),
    [
        (
            ("hello when did ghana", "mali"),
            {"max_length": 3},
            r"fills max_length=3 of \d+ tokens.*hello when",
        ),
        (("hello", ""), {}, r"the answer is empty.*hello"),
        (
            ([{"role": "user", "content": "hello"}],),
            {},
            r"no message has the model's role 'assistant' .*hello",
        ),
        ((("hello", "mali")), {"max_length": 0}, "max_length"),
    ],
    ids=["prompt too long", "empty answer", "no answer", "no room"],
)
def test_a_sample_that_teaches_nothing_is_refused_and_shown(content, settings, why):
    with pytest.raises(MaskedSampleError, match=why):
        build_sft(*content, tokenizer=tiny_tokenizer(), **settings)


@pytest.mark.parametrize(
    "content",
    [("hello",), ("hello", 3), ([],), ([("a", "b", "c")],), ([{"role": "user"}],), ([("a", "b")], "c")],
)
def test_content_of_another_form_is_refused(content):
    with pytest.raises(TypeError, match="question and its answer"):
        build_sft(*content, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("content", [None, 1957, ["hello"]])
@pytest.mark.parametrize("turn", [0, 1])
def test_content_that_is_no_text_is_refused(turn, content):
    """Jinja would write the word None."""
    pair = ["hello", "mali"]
    pair[turn] = content
    with pytest.raises(TypeError, match=f"content of message {turn} is "):
        build_sft([tuple(pair)], tokenizer=tiny_tokenizer())


def test_a_tokenizer_is_needed():
    with pytest.raises(TypeError, match="needs a tokenizer"):
        build_sft("hello", "mali")

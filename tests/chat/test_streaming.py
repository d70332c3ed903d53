"""Replies while they are made: whole letters, no white space at the ends, no stop strings."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orbit.chat.streaming import Reply
from tests.tiny_llm import tiny_tokenizer

TEXT = "Où est 日本? \U0001f680\U0001f680 là.\n\nUser: so"


@pytest.fixture(scope="module")
def by_bytes():
    """Every byte a token, so that most letters of TEXT come in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def stream(tokenizer, ids, stop=(), together=1):
    pieces = []
    reply = Reply(tokenizer, stop, pieces.append)
    reply.put(torch.tensor([[1, 2, 3]]))
    for start in range(0, len(ids), together):
        reply.put(torch.tensor(ids[start : start + together]))
    reply.end()
    assert "".join(pieces) == reply.text
    return reply, pieces


def test_letters_come_whole(by_bytes):
    ids = by_bytes(TEXT)["input_ids"]
    reply, pieces = stream(by_bytes, ids)
    assert reply.text == TEXT
    assert len(ids) > len(TEXT) >= len(pieces) >= 20
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("together", [1, 3, 100])
def test_a_stop_string_over_several_tokens_is_never_shown(by_bytes, together):
    ids = by_bytes(TEXT)["input_ids"]
    reply, _ = stream(by_bytes, ids, ["\nUser:", "never"], together)
    assert reply.text == TEXT.split("\n\nUser:")[0]
    assert reply.is_over(torch.zeros(2, 1)).tolist() == [True, True]


def test_a_reply_without_its_stop_string_is_whole(by_bytes):
    reply, _ = stream(by_bytes, by_bytes("a User")["input_ids"], ["User:"])
    assert reply.text == "a User"
    assert not reply.is_over(torch.zeros(1, 1)).item()


def test_white_space_at_the_ends_does_not_come_out(by_bytes):
    reply, pieces = stream(by_bytes, by_bytes(" \n a  b \n ")["input_ids"])
    assert reply.text == "a  b"
    assert pieces == ["a", "  b"]


def test_a_letter_that_never_becomes_whole_comes_at_the_end(by_bytes):
    reply, _ = stream(by_bytes, by_bytes("aé")["input_ids"][:2])
    assert reply.text == "a\ufffd"


def test_spaces_between_words_and_special_tokens():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("<start> hello mali <end> bamako <end>")["input_ids"]
    reply, _ = stream(tokenizer, ids)
    assert reply.text == tokenizer.decode(ids, skip_special_tokens=True)

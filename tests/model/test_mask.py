"""Masks: each against its definition spelt out key by key, and against what torch's function does with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orbit import utils
from orbit.model.errors import MaskError
from orbit.model.mask import (
    make_causal_mask,
    make_lookahead_mask,
    make_packed_mask,
    make_padding_mask,
    make_sliding_window_mask,
    positions_from_mask,
)


def spelt_out(queries: int, keys: int, sees: Callable[[int, int], bool]) -> Tensor:
    """(1, 1, T, S), by the positions i of the last T and j of all S tokens."""
    rows = [[sees(i, j) for j in range(keys)] for i in range(keys - queries, keys)]
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (1, 6), (3, 7)])
def test_definitions(queries: int, keys: int):
    def same(mask: Tensor, sees: Callable[[int, int], bool]) -> None:
        assert mask.dtype is torch.bool
        assert torch.equal(mask, spelt_out(queries, keys, sees))

    same(make_causal_mask(queries, keys), lambda i, j: j <= i)
    for n in (0, 1, 3):
        same(make_lookahead_mask(queries, n, keys), lambda i, j, n=n: j <= i + n)
    for w in (1, 2, 4, 100):
        same(make_sliding_window_mask(queries, w, keys), lambda i, j, w=w: i - w < j <= i)
        same(make_sliding_window_mask(queries, w, keys, causal=False), lambda i, j, w=w: abs(i - j) < w)


def test_windows_count_as_mistrals():
    from transformers.masking_utils import sliding_window_causal_mask_function

    sees = sliding_window_causal_mask_function(4)
    theirs = torch.tensor(
        [[bool(sees(0, 0, torch.tensor(i), torch.tensor(j))) for j in range(9)] for i in range(9)]
    )
    assert torch.equal(make_sliding_window_mask(9, 4)[0, 0], theirs)


def test_keys_are_as_many_as_queries_unless_given():
    assert make_causal_mask(4).shape == make_lookahead_mask(4).shape == make_sliding_window_mask(4, 2).shape
    assert torch.equal(make_causal_mask(4)[0, 0], torch.ones(4, 4).tril().bool())


def test_padding():
    ids = torch.tensor([[4, 5, 9], [9, 9, 4]])
    assert make_padding_mask(ids, pad_id=9).tolist() == [[[[True, True, False]]], [[[False, False, True]]]]
    lengths = torch.tensor([3, 1, 0])
    right = make_padding_mask(lengths, max_length=3)
    assert right[:, 0, 0].int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert torch.equal(make_padding_mask(lengths, max_length=3, side="left"), right.flip(-1))


def test_they_combine_and_go_into_torch_as_they_are():
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    mask = make_causal_mask(5) & make_padding_mask(torch.tensor([5, 3]), max_length=5)
    assert mask.shape == (2, 1, 5, 5)
    out = F.scaled_dot_product_attention(q, k, v, mask)
    assert torch.equal(
        out[:1], F.scaled_dot_product_attention(q[:1], k[:1], v[:1], torch.ones(5, 5).tril().bool())
    )
    short = F.scaled_dot_product_attention(q[1:, :, :3], k[1:, :, :3], v[1:, :, :3], is_causal=True)
    torch.testing.assert_close(out[1:, :, :3], short)


def test_new_queries_are_the_last_positions():
    """torch's own flag counts from the first key: one new query would see key 0 alone."""
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    new = F.scaled_dot_product_attention(q[:, :, -2:], k, v, make_causal_mask(2, 6))
    torch.testing.assert_close(new, full[:, :, -2:])
    torch_flag = F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True)
    torch.testing.assert_close(torch_flag, v[:, :, :1])


def test_positions():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: make_causal_mask(4, 3), "4 queries over 3 keys"),
        (lambda: make_causal_mask(0), "0 queries"),
        (lambda: make_lookahead_mask(4, -1), "lookahead -1"),
        (lambda: make_sliding_window_mask(4, 0), "window 0"),
        (lambda: make_padding_mask(torch.ones(2, 3, dtype=torch.long)), "need pad_id="),
        (
            lambda: make_padding_mask(torch.ones(2, 3, dtype=torch.long), pad_id=0, max_length=3),
            "no max_length",
        ),
        (lambda: make_padding_mask(torch.ones(2, dtype=torch.long)), "need max_length="),
        (lambda: make_padding_mask(torch.ones(2, dtype=torch.long), max_length=3, pad_id=0), "no pad_id="),
        (lambda: make_padding_mask(torch.ones(2, dtype=torch.long), max_length=3, side="top"), "'top'"),
        (lambda: make_padding_mask(torch.ones(2, 3), pad_id=0), "float32"),
        (lambda: make_padding_mask(torch.ones(2, 3, 4, dtype=torch.long), pad_id=0), r"\(2, 3, 4\)"),
        (lambda: positions_from_mask(torch.ones(2, 3)), "float32"),
        (lambda: positions_from_mask(torch.ones(2, 1, 1, 3).bool()), r"\(2, 1, 1, 3\)"),
    ],
)
def test_bad_input(make: Callable[[], Tensor], words: str):
    with pytest.raises(MaskError, match=words):
        make()


def test_documented_path():
    for name in ("make_causal_mask", "make_padding_mask", "make_lookahead_mask", "make_sliding_window_mask"):
        assert getattr(utils, name) is globals()[name]


def test_packed_texts_see_themselves_alone():
    mask = make_packed_mask(torch.tensor([[0, 1, 2, 0, 0, 1], [5, 6, 7, 8, 9, 10]]))
    assert mask.shape == (2, 1, 6, 6)
    text = torch.tensor([0, 0, 0, 1, 2, 2])
    assert torch.equal(mask[0, 0], text[:, None] == text[None])
    assert mask[1].all()

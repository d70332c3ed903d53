"""KVCache: what it gives back is what went in, in place or not, windowed or not, and never another's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from orbit.model import KVCache, MultiHeadAttention
from orbit.model.errors import CacheError

B, H, D = 2, 3, 4


def tokens(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(B, H, count, D), torch.randn(B, H, count, D)


def part(pair: tuple[Tensor, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    return pair[0][:, :, start:end], pair[1][:, :, start:end]


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_length", [None, 300])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 100])
def test_gives_what_later_queries_see(window: int | None, max_length: int | None, mode: type):
    """Chunks of all sizes: the new tokens and the window − 1 before them, in order."""
    with mode():
        whole = tokens(300)
        cache = KVCache(max_length, window=window)
        end = 0
        for size in (3, 1, 1, 5, 40, 1, 80, *[1] * 150, 19):
            found = cache.append(*part(whole, end, end + size))
            start = 0 if window is None else max(0, end - (window - 1))
            end += size
            assert same(found, part(whole, start, end))
            assert same(cache.held(), found)
            assert cache.length == end
    assert end == 300


def addresses(cache: KVCache, count: int) -> int:
    """In how many storages the keys lay while `count` single tokens came in."""
    whole = tokens(count)
    with torch.no_grad():
        seen = {
            cache.append(*part(whole, t, t + 1))[0].untyped_storage().data_ptr(): cache.held()  # kept alive
            for t in range(count)
        }
    return len(seen)


def test_grows_by_half_and_not_by_one():
    assert addresses(KVCache(), 2000) <= 10
    assert addresses(KVCache(2000), 2000) == 1
    assert addresses(KVCache(window=200), 2000) <= 22


def test_a_window_holds_little():
    cache = KVCache(window=16)
    with torch.no_grad():
        for _ in range(1000):
            keys, _ = cache.append(*tokens(1))
    assert keys.untyped_storage().nbytes() <= 4 * B * H * D * (16 + 1 + 64)


@pytest.mark.parametrize("mode", MODES)
def test_crop(mode: type):
    with mode():
        whole = tokens(20)
        cache = KVCache()
        cache.append(*part(whole, 0, 10))
        cache.append(*part(whole, 12, 16))
        cache.crop(9)
        assert cache.length == 9
        assert same(cache.append(*part(whole, 9, 20)), whole)
        cache.crop(0)
        assert same(cache.append(*part(whole, 3, 5)), part(whole, 3, 5))


def test_crop_never_touches_what_others_hold():
    """What was given back under autograd stays, and its backward goes through."""
    whole, query = tokens(4), torch.randn(B, H, 4, D, requires_grad=True)
    cache = KVCache()
    keys, _ = cache.append(*whole)
    before, score = keys.clone(), (query * keys).sum()
    cache.crop(2)
    with torch.no_grad():
        cache.append(*tokens(2))
    assert torch.equal(whole[0], before)
    assert torch.equal(keys, before)
    score.backward()


def test_crop_of_a_window():
    cache, whole = KVCache(window=4), tokens(20)
    with torch.no_grad():
        for t in range(0, 16, 4):
            cache.append(*part(whole, t, t + 4))
        cache.crop(12)  # the newest call can be taken back
        assert same(cache.append(*part(whole, 12, 13)), part(whole, 9, 13))
        with pytest.raises(CacheError, match="dropped the first 9 tokens"):
            cache.crop(11)
    assert cache.length == 13
    assert same(cache.held(), part(whole, 9, 13))
    with pytest.raises(CacheError, match="cannot crop to 14"):
        cache.crop(14)
    with pytest.raises(CacheError, match="cannot crop to -1"):
        cache.crop(-1)


@pytest.mark.parametrize("mode", MODES)
def test_select(mode: type):
    rows = torch.tensor([1, 1, 0])
    with mode():
        whole, more = tokens(5), (torch.randn(3, H, 1, D), torch.randn(3, H, 1, D))
        cache = KVCache()
        cache.append(*whole)
        cache.select(rows)
        found = cache.append(*more)
        wanted = [torch.cat((old[rows], new), 2) for old, new in zip(whole, more, strict=True)]
        assert same(found, (wanted[0], wanted[1]))
        KVCache().select(rows)  # nothing yet


def test_selected_rows_keep_their_backward():
    cache, query = KVCache(), torch.randn(1, H, 3, D, requires_grad=True)
    with torch.no_grad():
        cache.append(*tokens(3))
    cache.select(torch.tensor([1]))
    score = (query * cache.held()[0]).sum()
    with torch.no_grad():
        cache.append(torch.randn(1, H, 1, D), torch.randn(1, H, 1, D))
    score.backward()


def test_reset():
    cache = KVCache(5)
    with torch.no_grad():
        cache.append(*tokens(5))
        cache.reset()
        assert cache.length == 0
        new = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8)
        assert same(cache.append(*new), new)


def test_gradients_reach_every_token():
    """Also of earlier calls, whose results keep what their backward needs while the cache goes on."""
    whole = tuple(x.requires_grad_() for x in tokens(6))
    weight = torch.randn(B, H, 6, D)
    for window, first in ((None, 0), (3, 1)):
        cache, parts = KVCache(window=window), []
        for t in range(0, 6, 3):
            keys, values = cache.append(*part((whole[0], whole[1]), t, t + 3))
            parts.append((keys**2 * values * weight[:, :, t + 3 - keys.shape[2] : t + 3]).sum())
        found = torch.autograd.grad(sum(parts), whole)
        keys, values = whole
        second = (keys**2 * values * weight)[:, :, first:].sum()
        wanted = torch.autograd.grad((keys**2 * values * weight)[:, :, :3].sum() + second, whole)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w)


def test_from_one_mode_into_another():
    whole = tokens(8)
    cache = KVCache()
    for t, mode in enumerate([*MODES, *reversed(MODES), torch.inference_mode, torch.no_grad]):
        with mode():
            found = cache.append(*part(whole, t, t + 1))
        assert same(found, part(whole, 0, t + 1))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(
    ("keys", "values", "words"),
    [
        (torch.zeros(B + 1, H, 1, D), torch.zeros(B + 1, H, 1, D), r"\(3, 3, 1, 4\)"),
        (torch.zeros(B, 1, 1, D), torch.zeros(B, 1, 1, D), r"\(2, 1, 1, 4\)"),
        (torch.zeros(B, H, 1, D + 1), torch.zeros(B, H, 1, D), r"\(2, 3, 1, 5\)"),
        (torch.zeros(B, H, 1, D), torch.zeros(B, H, 1, D).double(), "values .* torch.float64"),
        (torch.zeros(B, H, 1, D, device="meta"), torch.zeros(B, H, 1, D), "on meta"),
        (torch.zeros(B, H, 1, D), torch.zeros(B, H, 2, D), "equal for both"),
        (torch.zeros(B, H, D), torch.zeros(B, H, D), r"\(B, H, T, D\) is needed"),
        (torch.zeros(B, H, 7, D), torch.zeros(B, H, 7, D), "exceed max_length 8"),
    ],
)
def test_what_does_not_belong_changes_nothing(keys: Tensor, values: Tensor, words: str, mode: type):
    with mode():
        cache, whole = KVCache(8), tokens(2)
        cache.append(*whole)
        with pytest.raises(CacheError, match=words):
            cache.append(keys, values)
        assert cache.length == 2
        assert same(cache.held(), whole)


def test_bad_settings():
    with pytest.raises(CacheError, match="max_length 0"):
        KVCache(0)
    with pytest.raises(CacheError, match="window 0"):
        KVCache(window=0)
    with pytest.raises(CacheError, match="empty"):
        KVCache().held()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_a_recomputation_adds_nothing(window: int | None, reentrant: bool):
    """Window 2 and single tokens: the second run has the first one's shapes, so that nothing else would notice."""
    layer = MultiHeadAttention(8, 2, causal=True, window=window)
    cache = layer.make_cache()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
    last = x[:, 2:].requires_grad_()
    y = checkpoint(lambda t: layer(t, cache=cache), last, use_reentrant=reentrant)
    with pytest.raises(
        CacheError, match=r"holds these tokens \(3 in all\).*Run checkpointed layers without cache="
    ):
        y.sum().backward()
    assert cache.length == 3


def test_a_recomputation_of_cross_attention_says_so():
    layer = MultiHeadAttention(8, 2, context_size=6)
    cache, x = layer.make_cache(), torch.randn(2, 3, 8, requires_grad=True)
    y = checkpoint(lambda t: layer(t, torch.ones(2, 4, 6), cache=cache), x, use_reentrant=False)
    with pytest.raises(CacheError, match="activation checkpointing runs the layer again"):
        y.sum().backward()


def test_a_recomputation_makes_a_cache_of_its_own():
    layer, x = MultiHeadAttention(8, 2, causal=True), torch.randn(2, 3, 8, requires_grad=True)

    def decode(x: Tensor) -> Tensor:
        cache = layer.make_cache()
        return torch.cat([layer(x[:, t : t + 1], cache=cache) for t in range(3)], 1)

    checkpoint(decode, x, use_reentrant=False).sum().backward()
    found, x.grad = x.grad, None
    decode(x).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0, atol=0)

"""MultiHeadAttention against torch's function and transformers' Llama, Mistral and Qwen3 layers on the same weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.model import (
    KVCache,
    MultiHeadAttention,
    RotaryPositionalEmbedding,
    make_causal_mask,
    make_padding_mask,
    make_sliding_window_mask,
    positions_from_mask,
)
from orbit.model.errors import CacheError, MaskError, SettingError, ShapeError

B, T, HIDDEN, H, D = 2, 11, 32, 4, 8


def reference_layer(kind: str, groups: int, window: int | None = None) -> tuple[nn.Module, nn.Module]:
    """A transformers attention layer that computes plainly, and its rotary embedding."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=HIDDEN,
        num_attention_heads=H,
        num_key_value_heads=groups,
        head_dim=D,
        attention_bias=False,
        attn_implementation="eager",
        **({"sliding_window": window} if window else {}),
    )
    module = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    layer = getattr(module, f"{kind}Attention")(config, layer_idx=0)
    return layer.eval(), getattr(module, f"{kind}RotaryEmbedding")(config)


def ask(layer: nn.Module, rotary: nn.Module, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return layer(x, rotary(x, positions), attention_mask=bias)[0]


def twins(
    kind: str, groups: int, window: int | None = None
) -> tuple[MultiHeadAttention, nn.Module, nn.Module]:
    """Our layer, transformers' with the same weights, and its rotary embedding."""
    layer, rotary = reference_layer(kind, groups, window)
    for name, p in layer.named_parameters():
        nn.init.normal_(p, std=1.0 if "norm" in name else 0.2)
    ours = MultiHeadAttention(
        HIDDEN,
        H,
        groups,
        head_dim=D,
        causal=True,
        window=window,
        rope=RotaryPositionalEmbedding(D, rotary.config.rope_parameters["rope_theta"]),
        qk_norm=kind == "Qwen3",
    )
    ours.load_state_dict(layer.state_dict())
    return ours.eval(), layer, rotary


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


KINDS = [("Llama", None), ("Mistral", 4), ("Qwen3", None)]


def own_mask(queries: int, window: int | None) -> Tensor:
    return make_causal_mask(queries) if window is None else make_sliding_window_mask(queries, window)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_equals_transformers(kind: str, window: int | None, groups: int, side: str | None):
    ours, layer, rotary = twins(kind, groups, window)
    x, seen, positions, mask = torch.randn(B, T, HIDDEN), own_mask(T, window), torch.arange(T)[None], None
    if side is not None:
        mask = make_padding_mask(torch.tensor([T, T - 4]), max_length=T, side=side)
        seen = seen & mask
        positions = positions_from_mask(mask[:, 0, 0])
    real = torch.ones(B, T).bool() if mask is None else mask[:, 0, 0]
    wanted = ask(layer, rotary, x, seen, positions)[real]

    close(ours(x, mask=mask)[real], wanted)
    close(ours(x, mask=mask, need_weights=True)[0][real], wanted)
    close(ours(x, mask=mask, positions=positions.expand(B, T))[real], wanted)
    close(ours(x, mask=mask, rotation=ours.rope(positions))[real], wanted)
    if mask is not None:
        close(ours(x, mask=real)[real], wanted)  # (B, S)


@pytest.mark.parametrize("chunks", [[1] * T, [4, 1, 1, 5], [1, 10], [T]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS)
def test_cached_chunks_equal_the_full_pass(kind: str, window: int | None, padded: bool, chunks: list[int]):
    """Token by token, in one piece and between; left-padded rows too; under autograd and without."""
    ours, layer, rotary = twins(kind, 2, window)
    x, seen = torch.randn(B, T, HIDDEN), own_mask(T, window)
    real = torch.ones(B, T).bool()
    if padded:
        real = make_padding_mask(torch.tensor([T, T - 4]), max_length=T, side="left")[:, 0, 0]
    positions = positions_from_mask(real)
    wanted = ask(layer, rotary, x, seen & real[:, None, None], positions)[real]
    for mode in (torch.enable_grad, torch.no_grad):
        for given in (False, True):
            cache, parts, end = ours.make_cache(), [], 0
            for size in chunks:
                start, end = end, end + size
                mask = real[:, :end] if padded else None
                given_positions = positions[:, start:end] if given else None
                with mode():
                    parts.append(ours(x[:, start:end], mask=mask, cache=cache, positions=given_positions))
            close(torch.cat(parts, 1)[real], wanted)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_torch(groups: int, causal: bool, bias: bool):
    ours = MultiHeadAttention(HIDDEN, H, groups, causal=causal, bias=bias)
    x = torch.randn(B, T, HIDDEN)
    q, k, v = (p(x).view(B, T, -1, D).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    close(ours(x), ours.o_proj(heads.transpose(1, 2).reshape(B, T, HIDDEN)))


def test_equals_torchs_own_module_across_two_sequences():
    """nn.MultiheadAttention with a context of another width and padded keys; weights too."""
    theirs = nn.MultiheadAttention(HIDDEN, H, kdim=20, vdim=20, bias=False, batch_first=True)
    ours = MultiHeadAttention(HIDDEN, H, context_size=20)
    names = {"q_proj": "q_proj_weight", "k_proj": "k_proj_weight", "v_proj": "v_proj_weight"}
    state = {f"{mine}.weight": getattr(theirs, name) for mine, name in names.items()}
    ours.load_state_dict({**state, "o_proj.weight": theirs.out_proj.weight})
    x, context = torch.randn(B, T, HIDDEN), torch.randn(B, 7, 20)
    real = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    wanted, weights = theirs(x, context, context, key_padding_mask=~real, average_attn_weights=False)
    found, seen = ours(x, context, mask=real, need_weights=True)
    close(found, wanted)
    close(seen, weights)
    close(ours(x, context, mask=real), wanted)

    cache = ours.make_cache()
    close(ours(x[:, :1], context, mask=real, cache=cache), wanted[:, :1])
    close(ours(x[:, 1:], mask=real, cache=cache), wanted[:, 1:])
    assert cache.length == 7
    with pytest.raises(CacheError, match="holds 7 keys"):
        ours(x, context, cache=cache)
    for other in (ours, MultiHeadAttention(HIDDEN, H, 2, context_size=20)):
        with pytest.raises(CacheError, match="another layer or batch filled it"):
            other(x[:1] if other is ours else x, cache=cache)
    with pytest.raises(CacheError, match="holds 0 keys"):
        ours(x, cache=ours.make_cache())
    with pytest.raises(ShapeError, match="needs a context"):
        ours(x)


def test_a_context_of_the_same_width_needs_no_setting():
    ours, x = MultiHeadAttention(HIDDEN, H), torch.randn(B, T, HIDDEN)
    close(ours(x, x), ours(x))
    with pytest.raises(CacheError, match="context_size="):
        ours(x, x, cache=KVCache())


def test_output_gate():
    """σ of a projection of the input, on the concatenated heads: at 0 it halves, far out it is open or shut."""
    plain, gated = MultiHeadAttention(HIDDEN, H, 2), MultiHeadAttention(HIDDEN, H, 2, output_gate=True)
    missing, extra = gated.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, extra) == (["gate_proj.weight"], [])
    x = torch.randn(B, T, HIDDEN)
    nn.init.zeros_(gated.gate_proj.weight)
    close(gated(x), plain(x) / 2)
    x[..., 0] = 1
    gated.gate_proj.weight.data[:, 0] = torch.tensor([100.0, -100.0]).repeat_interleave(HIDDEN // 2)
    shut = plain.o_proj.weight.clone()
    plain.o_proj.weight.data[:, HIDDEN // 2 :] = 0
    close(gated(x), plain(x))
    assert not torch.equal(shut, plain.o_proj.weight)


@pytest.mark.parametrize("window", [None, 3])
def test_weights_are_those_of_the_fused_path(window: int | None):
    ours = MultiHeadAttention(HIDDEN, H, 2, causal=True, window=window, rope=RotaryPositionalEmbedding(D))
    x, real = torch.randn(B, T, HIDDEN), make_padding_mask(torch.tensor([T, 6]), max_length=T)
    found, weights = ours(x, mask=real, need_weights=True)
    torch.testing.assert_close(found, ours(x, mask=real), atol=1e-6, rtol=0)
    assert weights.shape == (B, H, T, T)
    seen = own_mask(T, window) & real
    assert weights[~seen.expand_as(weights)].abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), seen.any(-1).float().expand(B, H, T))


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_that_sees_nothing_gives_the_bias(need_weights: bool):
    ours = MultiHeadAttention(HIDDEN, H, bias=True, causal=True)
    real = make_padding_mask(torch.tensor([T, 4]), max_length=T, side="left")
    out = ours(torch.randn(B, T, HIDDEN), mask=real, need_weights=need_weights)
    out = out[0] if need_weights else out
    assert torch.equal(out[1, : T - 4], ours.o_proj.bias.expand(T - 4, HIDDEN))


def test_dropout_acts_in_training_alone():
    ours, x = MultiHeadAttention(HIDDEN, H, dropout=0.5), torch.randn(B, T, HIDDEN)
    assert not torch.equal(ours(x), ours(x))
    assert not torch.equal(ours(x, need_weights=True)[0], ours(x, need_weights=True)[0])
    ours.eval()
    assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_cache_under_autocast(qk_norm: bool):
    rope = RotaryPositionalEmbedding(D)
    ours, x = (
        MultiHeadAttention(HIDDEN, H, 2, causal=True, rope=rope, qk_norm=qk_norm),
        torch.randn(B, T, HIDDEN),
    )
    wanted, cache = ours(x), ours.make_cache()
    with torch.autocast("cpu", torch.bfloat16):
        parts = [ours(x[:, t : t + 1], cache=cache) for t in range(T)]
    assert {k.dtype for k in cache.held()} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat(parts, 1).float(), wanted, atol=2e-2, rtol=0)


def test_decoding_compiles_to_whole_graphs():
    torch.compiler.reset()
    ours = MultiHeadAttention(HIDDEN, H, 2, causal=True, rope=RotaryPositionalEmbedding(D), window=6)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(B, T, HIDDEN)
    wanted, cache = ours(x), ours.make_cache()
    with torch.no_grad():
        parts = [compiled(x[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 11))]
    close(torch.cat(parts, 1), wanted)
    torch.compiler.reset()


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 100, "num_heads": 8}, "100 is no multiple of num_heads 8: choose 96 or 104"),
        ({"hidden_size": 4, "num_heads": 8}, "choose 8, or give head_dim="),
        ({"num_heads": 4, "num_kv_heads": 3}, "choose one of 1, 2, 4"),
        ({"num_heads": 0}, "num_heads 0"),
        ({"num_kv_heads": 0}, "num_kv_heads 0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"window": 0}, "window 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"rope": RotaryPositionalEmbedding(6)}, "rope turns heads of 6, these have 8"),
        ({"context_size": 20, "causal": True}, "no order"),
        ({"context_size": 20, "window": 4}, "no order"),
        ({"context_size": 20, "rope": RotaryPositionalEmbedding(D)}, "no order"),
        ({"context_size": 0}, "context_size 0"),
    ],
)
def test_bad_settings(settings: dict, words: str):
    with pytest.raises(SettingError, match=words):
        MultiHeadAttention(**{"hidden_size": HIDDEN, "num_heads": H, **settings})


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(B, T), "boolean, True = attend, not torch.float32"),
        (torch.ones(B, T, dtype=torch.long), "not torch.int64"),
        (torch.ones(T, T).bool(), r"\(11, 11\) does not fit B=2, H=4, T=11, S=11"),
        (torch.ones(B, T + 1).bool(), r"\(2, 12\)"),
        (torch.ones(B, T, 1).bool(), r"\(2, 11, 1\)"),
        (torch.ones(B, 3, T, T).bool(), r"\(2, 3, 11, 11\)"),
        (torch.ones(T).bool(), r"\(11,\)"),
        (torch.ones(1, B, H, T, T).bool(), r"\(1, 2, 4, 11, 11\)"),
    ],
)
def test_bad_masks(mask: Tensor, words: str):
    ours = MultiHeadAttention(HIDDEN, H, causal=True)
    cache = ours.make_cache()
    with pytest.raises(MaskError, match=words):
        ours(torch.randn(B, T, HIDDEN), mask=mask, cache=cache)
    assert cache.length == 0


def test_bad_inputs():
    ours, x = MultiHeadAttention(HIDDEN, H, rope=RotaryPositionalEmbedding(D)), torch.randn(B, T, HIDDEN)
    plain, cross = MultiHeadAttention(HIDDEN, H), MultiHeadAttention(HIDDEN, H, context_size=20)
    for bad in (torch.randn(HIDDEN), torch.randn(T, HIDDEN), torch.randn(B, T, HIDDEN + 1)):
        with pytest.raises(ShapeError, match=r"\(B, T, 32\)"):
            ours(bad)
    with pytest.raises(SettingError, match="no order"):
        ours(x, x)
    for bad in (torch.randn(B, 7, 21), torch.randn(B + 1, 7, 20), torch.randn(7, 20)):
        with pytest.raises(ShapeError, match=r"\(2, S, 20\) is needed"):
            cross(x, bad)
    with pytest.raises(SettingError, match="give one of the two"):
        ours(x, rotation=ours.rope(torch.arange(T)), positions=torch.arange(T))
    with pytest.raises(SettingError, match="comes from rope"):
        ours(x, rotation=(torch.ones(T, D), torch.zeros(T, D)))
    with pytest.raises(SettingError, match="need a rope"):
        plain(x, positions=torch.arange(T))
    with pytest.raises(SettingError, match="no rotation"):
        cross(x, torch.randn(B, 7, 20), rotation=ours.rope(torch.arange(T)))
    for positions in (torch.arange(T + 1), torch.zeros(B + 1, T).long(), torch.zeros(1, 1, T).long()):
        with pytest.raises(ShapeError, match="do not fit"):
            ours(x, positions=positions)


def test_bad_caches():
    x = torch.randn(B, T, HIDDEN)
    windowed = MultiHeadAttention(HIDDEN, H, causal=True, window=4)
    for cache in (KVCache(), KVCache(window=5)):
        with pytest.raises(CacheError, match=r"this layer sees 4 .*make_cache"):
            windowed(x, cache=cache)
        assert cache.length == 0
    with pytest.raises(CacheError, match="keeps a window of 4, this layer sees None"):
        MultiHeadAttention(HIDDEN, H, causal=True)(x, cache=KVCache(window=4))
    with pytest.raises(CacheError, match="needs causal=True"):
        MultiHeadAttention(HIDDEN, H)(x, cache=KVCache())
    cache = windowed.make_cache()
    windowed(x, cache=cache)
    other = MultiHeadAttention(HIDDEN, H, 2, causal=True, window=4)
    with pytest.raises(CacheError, match="every layer and batch has its own"):
        other(x, cache=cache)
    with pytest.raises(CacheError, match="every layer and batch has its own"):
        windowed(x[:1], cache=cache)
    assert cache.length == T
    with pytest.raises(CacheError, match="exceed max_length 10"):
        windowed(x, cache=windowed.make_cache(10))


def test_adapters_graft_onto_the_projections():
    from orbit.adapter import AdapterConfig, inject

    model = nn.ModuleList([MultiHeadAttention(HIDDEN, H, 2, causal=True, rope=RotaryPositionalEmbedding(D))])
    x = torch.randn(B, T, HIDDEN)
    before = model[0](x)
    names = set(model.state_dict())
    inject(model, AdapterConfig(r=2, targets=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert {n.split(".")[1] for n in set(model.state_dict()) - names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert torch.equal(model[0](x), before)

"""MultiHeadAttention against torch's function and transformers' Llama, Mistral and Qwen3 layers on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orbit.model import MultiHeadAttention, RotaryPositionalEmbedding

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
    module = __import__(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}", fromlist=["x"])
    layer = getattr(module, f"{kind}Attention")(config, layer_idx=0)
    return layer.eval(), getattr(module, f"{kind}RotaryEmbedding")(config)


def visible_by_hand(queries: int, keys: int, window: int | None = None) -> Tensor:
    """Which key each query sees, spelt out."""
    return torch.tensor(
        [
            [j <= i and (window is None or i - j < window) for j in range(keys)]
            for i in range(keys - queries, keys)
        ]
    )


def ask(layer: nn.Module, rotary: nn.Module, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return layer(x, rotary(x, positions), attention_mask=bias)[0]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("kind", "window"), [("Llama", None), ("Mistral", 4), ("Qwen3", None)])
def test_equals_transformers(kind: str, window: int | None, groups: int):
    layer, rotary = reference_layer(kind, groups, window)
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
    if kind == "Qwen3":
        nn.init.normal_(layer.q_norm.weight), nn.init.normal_(layer.k_norm.weight)
        ours.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, HIDDEN)
    seen = visible_by_hand(T, T, window)[None, None]
    expected = ask(layer, rotary, x, seen, torch.arange(T)[None])
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=0)

    cache = ours.make_cache()
    tokens = [ours(x[:, t : t + 1], cache=cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(tokens, 1), expected, atol=1e-5, rtol=0)

"""Building blocks against hand-written ones: `make bench-blocks`, or `python -m benchmarks.blocks [--device cuda]`.

    attention  causal self-attention against torch's kernel between four hand-written projections: all heads alike,
               grouped queries, grouped queries with rotary positions (cosine and sine made once, for both)
    rope       cosine, sine and the rotation of q and k against transformers' LlamaRotaryEmbedding and
               `apply_rotary_pos_emb`
    moe        a routed mixture, forward and backward, against a careful loop over experts and against transformers'
               MixtralSparseMoeBlock, as a loop and by `grouped_mm`
    init       `auto_initialize` of a decoder of 100 million parameters against `normal_` on each of them

Every figure is a ratio, ours over theirs, taken as `measuring.py` says. `block_pairs.py` has the hand-written blocks;
both sides have the same weights and give the same outputs and gradients before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.block_pairs import HandWrittenAttention, Loop, Pass, Sizes, check_same, rotation_of
from benchmarks.measuring import DTYPES, Groups, Line, Setting, measure, timed
from orbit.model import MoE, MultiHeadAttention, RotaryPositionalEmbedding, auto_initialize, rotate


def noise(setting: Setting[Sizes], dtype: torch.dtype, *shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(setting.device, dtype)


def both_ways(
    setting: Setting[Sizes], what: str, mine: Pass, theirs: Pass, bar: float, other: str = "by hand"
) -> Iterator[Line]:
    """Forward alone, without gradients, and forward with backward, after both were found the same."""
    check_same(mine, theirs, what)
    t = setting.times({"us": mine.forward, "them": theirs.forward})
    yield timed(f"{what}, forward", t["us"], t["them"], bar, other)
    t = setting.times({"us": mine.backward, "them": theirs.backward})
    yield timed(f"{what}, forward and backward", t["us"], t["them"], bar, other)


def attention(setting: Setting[Sizes]) -> Iterator[Line]:
    size = setting.shape
    head_dim = size.hidden // size.heads
    for kind, dtype in DTYPES.items():
        x = noise(setting, dtype, size.batch, size.length, size.hidden)
        for name, kv_heads, rotary in (
            (f"{size.heads} heads", size.heads, False),
            (f"{size.heads} heads on {size.kv_heads}", size.kv_heads, False),
            (f"{size.heads} heads on {size.kv_heads}, RoPE", size.kv_heads, True),
        ):
            torch.manual_seed(0)
            rope = RotaryPositionalEmbedding(head_dim) if rotary else None
            mine = MultiHeadAttention(size.hidden, size.heads, kv_heads, causal=True, rope=rope)
            theirs = HandWrittenAttention(size.hidden, size.heads, kv_heads)
            theirs.load_state_dict(mine.state_dict())
            mine.to(setting.device, dtype)
            theirs.to(setting.device, dtype)
            ours = by_hand = None
            if rope is not None:
                ours = rope(torch.arange(size.length, device=setting.device), dtype)
                by_hand = rotation_of(head_dim, size.length, setting.device, dtype)
            us = Pass(partial(mine, rotation=ours), [x], mine.parameters())
            them = Pass(partial(theirs, rotation=by_hand), [x], theirs.parameters())
            yield from both_ways(setting, f"attention, {name}, {kind}", us, them, bar=1.02)


def rope(setting: Setting[Sizes]) -> Iterator[Line]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    size = setting.shape
    head_dim = size.hidden // size.heads
    position = torch.arange(size.length, device=setting.device)
    mine = RotaryPositionalEmbedding(head_dim).to(setting.device)
    config = LlamaConfig(hidden_size=size.hidden, num_attention_heads=size.heads)
    theirs = LlamaRotaryEmbedding(config).to(setting.device)

    def us(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        rotation = mine(position, q.dtype)
        return rotate(q, rotation), rotate(k, rotation)

    def them(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        turned: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q, k, *theirs(q, position[None]))
        return turned

    for kind, dtype in DTYPES.items():
        # as projections leave them: heads beside each other in memory
        q = noise(setting, dtype, size.batch, size.length, size.heads, head_dim).transpose(1, 2)
        k = noise(setting, dtype, size.batch, size.length, size.kv_heads, head_dim, seed=2).transpose(1, 2)
        passes = Pass(us, [q, k]), Pass(them, [q, k])
        yield from both_ways(setting, f"RoPE, {kind}", *passes, bar=1.0, other="transformers")


def mixtral(mine: MoE, size: Sizes, form: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_local_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    config._experts_implementation = form
    block: nn.Module = MixtralSparseMoeBlock(config)
    block.load_state_dict(mine.state_dict())
    return block


def moe(setting: Setting[Sizes]) -> Iterator[Line]:
    size = setting.shape
    for kind, dtype in DTYPES.items():
        torch.manual_seed(0)
        x = noise(setting, dtype, 1, size.tokens, size.hidden)
        mine = MoE(size.hidden, size.intermediate, size.experts, size.top_k)
        loop = Loop(size.hidden, size.intermediate, size.experts, size.top_k)
        loop.take(mine.state_dict())
        blocks = {
            "a careful loop": loop,
            "Mixtral's loop": mixtral(mine, size, "eager"),
            "Mixtral's grouped_mm": mixtral(mine, size, "grouped_mm"),
        }
        them = {}
        for name, block in blocks.items():
            block.to(setting.device, dtype)
            them[name] = Pass(block, [x], block.parameters())
        mine.to(setting.device, dtype)
        us = Pass(mine, [x], mine.parameters())
        for name, other in them.items():
            check_same(us, other, f"MoE and {name}, {kind}")
        t = setting.times({"us": us.backward, **{name: other.backward for name, other in them.items()}})
        for name in them:
            what = f"MoE, forward and backward, against {name}, {kind}"
            yield timed(what, t["us"], t[name], 1.0, other="theirs")


def decoder(size: Sizes) -> nn.Module:
    """The layers of a decoder, never run."""
    kinds: list[nn.Module] = [nn.Embedding(size.vocabulary, size.hidden)]
    for _ in range(size.layers):
        kinds += [nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(4)]
        kinds += [nn.Linear(size.hidden, 4 * size.hidden), nn.Linear(4 * size.hidden, size.hidden)]
        kinds += [nn.LayerNorm(size.hidden), nn.RMSNorm(size.hidden)]
    return nn.Sequential(*kinds, nn.Linear(size.hidden, size.vocabulary, bias=False))


def init(setting: Setting[Sizes]) -> Iterator[Line]:
    model = decoder(setting.shape).to(setting.device)
    parameters = list(model.parameters())

    def fills() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.normal_(0.0, 0.02)

    t = setting.times({"us": lambda: auto_initialize(model), "them": fills})
    count = sum(p.numel() for p in parameters) / 1e6
    yield timed(f"auto_initialize, {count:.0f} million parameters", t["us"], t["them"], 1.3, "normal_")


GROUPS: Groups[Sizes] = {"attention": attention, "rope": rope, "moe": moe, "init": init}


def main(argv: list[str] | None = None) -> None:
    description = __doc__.split("\n")[0]
    measure(
        "python -m benchmarks.blocks", description, GROUPS, Sizes, argv, "theirs", ("torch", "transformers")
    )


if __name__ == "__main__":
    main()

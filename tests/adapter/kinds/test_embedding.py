"""Adapted embeddings against the dense oracle, and against PEFT where PEFT is right."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    GraftError,
    MergeError,
    RouteError,
    base_state_dict,
    inject,
    merge,
    route,
    unmerge,
)
from orbit.adapter.routes.plan import Scaled
from tests.adapter.oracle import VARIANTS, bare_copy, dense_weight, same_as_dense, trained

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "by frequency": {"scale_grad_by_freq": True},
    "both": {"padding_idx": 2, "scale_grad_by_freq": True},
    "padding from the end": {"padding_idx": -1},
}
TOKENS = torch.tensor([[1, 2, 2, 3, 6], [1, 1, 0, 3, 2], [5, 4, 6, 6, 3]])


def make(dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    return nn.Embedding(7, 5, **options, dtype=dtype)


def delta(A: Tensor, B: Tensor) -> Tensor:
    return torch.einsum("dr,rn->nd", B, A)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", LAYERS)
def test_is_the_layer_with_the_dense_weight(options: str, variant: str) -> None:
    layer = make(**LAYERS[options])
    bare = bare_copy(layer)
    trained(layer, **VARIANTS[variant])
    for tokens in (TOKENS, TOKENS[0], TOKENS[0, 0], TOKENS.int()):
        same_as_dense(layer, bare, tokens, delta, out_axis=1)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_base_that_trains_too_is_the_dense_layer(kind: str) -> None:
    layer = make(**LAYERS["both"])
    bare = copy.deepcopy(layer)
    trained(layer, **VARIANTS[kind])
    layer.weight.requires_grad_(True)
    slot = layer.slots()["default"]
    W = dense_weight(bare.weight, slot, delta(slot.down.weight, slot.up.weight), 1)
    dy = torch.randn(*TOKENS.shape, 5).double()
    mine = torch.autograd.grad((layer(TOKENS) * dy).sum(), [layer.weight, slot.up.weight])
    theirs = torch.autograd.grad(
        (functional_call(bare, {"weight": W}, (TOKENS,)) * dy).sum(), [bare.weight, slot.up.weight]
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_is_pefts(kind: str) -> None:
    mine = trained(make(), dropout=0.4, **VARIANTS[kind])  # which neither applies
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        lora_dropout=0.4,
        target_modules=["e"],
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
    )
    model = peft.get_peft_model(nn.ModuleDict({"e": make()}), config)
    theirs, slot = model.base_model.model["e"], mine.slots()["default"]
    pairs = [(slot.down.weight, theirs.lora_embedding_A["default"])]
    pairs.append((slot.up.weight, theirs.lora_embedding_B["default"]))
    if slot.magnitude is not None:
        pairs.append((slot.magnitude.weight, theirs.lora_magnitude_vector["default"].weight))
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own)
    results = []
    for layer, index in ((mine, 0), (theirs, 1)):
        y = layer.train()(TOKENS)
        results.append((y, torch.autograd.grad(y.square().sum(), [pair[index] for pair in pairs])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_returns_the_very_bits_and_can_learn(dtype: torch.dtype, variant: str) -> None:
    layer = make(dtype, **LAYERS["both"])
    before = layer(TOKENS)
    inject(layer, AdapterConfig(r=2, **VARIANTS[variant]))
    assert torch.equal(layer(TOKENS), before)
    slot = layer.slots()["default"]
    assert slot.down.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not slot.down.weight.any()
    layer(TOKENS).float().sum().backward()
    assert slot.down.weight.grad.abs().sum() > 0
    assert not slot.down.weight.grad[:, 2].any()  # the padding row


def test_the_names_are_pefts() -> None:
    layer = make()
    inject(layer, AdapterConfig(r=2, dora=True), "a")
    assert set(layer.state_dict()) == {
        "weight",
        "lora_embedding_A.a.weight",
        "lora_embedding_B.a.weight",
        "lora_magnitude.a.weight",
    }
    assert set(base_state_dict(layer)) == {"weight"}
    make().load_state_dict(base_state_dict(layer))
    layer.load_state_dict(make().state_dict())  # a base checkpoint knows no tasks


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_is_the_routed_layer_and_unmerge_the_very_bits(variant: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        layer = trained(make(dtype), **VARIANTS[variant]).eval()
        routed, weight = layer(TOKENS), layer.weight.clone()
        merge(layer)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-9
        torch.testing.assert_close(layer(TOKENS), routed, rtol=tolerance, atol=tolerance)
        assert layer.weight.is_contiguous()
        unmerge(layer)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer(TOKENS), routed)


@pytest.mark.parametrize("variant", ["lora", "gated dora"])
@pytest.mark.parametrize("options", ["plain", "both"])
def test_rows_and_sums_are_the_tasks_own(options: str, variant: str) -> None:
    layer = trained(make(**LAYERS[options]), "a", **VARIANTS[variant])
    trained(layer, "b", seed=1, r=3, **VARIANTS[variant])
    one = {}
    for task in ("a", "b", None):
        one[task] = layer(TOKENS, task=task)
    torch.testing.assert_close(
        layer(TOKENS, task=["b", None, "a"]), torch.stack([one["b"][0], one[None][1], one["a"][2]])
    )
    want = one[None] + 0.5 * (one["a"] - one[None]) - 2 * (one["b"] - one[None])
    torch.testing.assert_close(layer(TOKENS, tasks={"a": 0.5, "b": -2.0}), want)
    scalings = torch.randn(3, 5, 1, 2).double()
    with route(layer, Scaled(("a", "b"), scalings, {id(layer): 0})):
        y = layer(TOKENS)
    w = scalings[:, :, 0, :, None]
    torch.testing.assert_close(
        y, one[None] + w[:, :, 0] * (one["a"] - one[None]) + w[:, :, 1] * (one["b"] - one[None])
    )


class Shared(nn.Module):
    """Calls an embedding with indices that its caller's rows share."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return x + self.layer(indices)


def test_positions_that_all_rows_share() -> None:
    model = Shared(make())
    inject(model, AdapterConfig(r=2, targets=("layer",)), "a")
    with torch.no_grad():
        model.layer.slots()["a"].down.weight.normal_()
    shared, x = TOKENS[:1], torch.zeros(3, 5, 5).double()
    on, off = model(x, shared, task="a")[0], model(x, shared, task=None)[0]
    assert not torch.equal(on, off)
    torch.testing.assert_close(model(x, shared, task=["a", None, "a"]), torch.stack([on, off, on]))
    for n in (5, 6):  # six would look like two tokens for each of three rows
        with pytest.raises(RouteError, match=r"or \(1, …\) if all rows share"):
            model(x, torch.arange(n), task=["a", None, "a"])
    labels, flat = TOKENS[:, 0], torch.zeros(3, 5).double()
    mixed = model(flat, labels, task=["a", None, "a"])
    assert torch.equal(mixed[1], model(flat, labels, task=None)[1])
    assert torch.equal(mixed[::2], model(flat, labels, task="a")[::2])


def test_subclasses_that_compute_their_indices_or_scale_what_they_find() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    torch.manual_seed(7)
    scaled = Gemma3TextScaledWordEmbedding(7, 5, 0, embed_scale=3.0).double()
    bare = bare_copy(scaled)
    same_as_dense(trained(scaled, dora=True), bare, TOKENS, delta, out_axis=1)
    positions = OPTLearnedPositionalEmbedding(7, 5).double()
    bare = bare_copy(positions)
    same_as_dense(trained(positions), bare, torch.ones(2, 6, dtype=torch.long), delta, out_axis=1)


def test_a_tied_head_stays_as_it_was(llama: Any, tokens: Tensor, fill: Any) -> None:
    model = llama(tie_word_embeddings=True)
    hidden = torch.randn(2, 32)
    before = model.lm_head(hidden)
    inject(model, AdapterConfig(r=2, targets=("embed_tokens",)))
    off = model(tokens, task=None).logits
    fill(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head(hidden), before)
    assert not torch.equal(model(tokens).logits, off)
    with pytest.raises(MergeError, match="shares its storage with lm_head"):
        merge(model)
    routed = model(tokens).logits
    merge(model, untie=True)
    torch.testing.assert_close(model(tokens).logits, routed, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_resized_embedding_is_refused(llama: Any, tokens: Tensor) -> None:
    model = llama(tie_word_embeddings=True)
    inject(model, AdapterConfig(r=2, targets=("embed_tokens",)))
    model.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises((GraftError, RouteError), match="resize"):
        model(tokens)
    layer = trained(make())
    layer.weight = nn.Parameter(torch.randn(9, 5).double())
    with pytest.raises(GraftError, match="has 9 rows and its adapter 7"):
        layer(TOKENS)


def test_max_norm_shrinks_the_base_row_alone() -> None:
    layer = trained(make(max_norm=0.5))
    slot = layer.slots()["default"]
    A = slot.down.weight.clone()
    with torch.no_grad():
        y = layer(TOKENS)
    W = layer.weight
    assert (W[TOKENS].norm(dim=-1) <= 0.5 + 1e-6).all()
    assert torch.equal(slot.down.weight, A)  # PEFT shrinks A as well
    torch.testing.assert_close(y, (W + slot.coefficient * delta(slot.down.weight, slot.up.weight))[TOKENS])
    with pytest.raises(MergeError, match="max_norm"):
        merge(layer)
    with pytest.raises(GraftError, match="max_norm"):
        inject(make(max_norm=0.5), AdapterConfig(r=2, dora=True))


def test_sparse_concerns_the_weight_alone() -> None:
    layer = trained(make(sparse=True))
    layer(TOKENS).sum().backward()
    assert not layer.slots()["default"].down.weight.grad.is_sparse


def test_the_cached_norm_follows_the_weight() -> None:
    layer = trained(make(), dora=True)
    slot = layer.slots()["default"]

    def norm() -> Tensor:
        V = layer.weight + slot.up.scale * delta(slot.down.weight, slot.up.weight)
        value = layer.row_norm(slot)
        torch.testing.assert_close(value, V.norm(dim=0))
        return value

    first = norm()
    assert "_orbit_w2" in vars(layer)
    with torch.no_grad():
        layer.weight.mul_(3)
    assert not torch.allclose(norm(), first)


def test_a_rank_above_the_matrix_is_refused_at_once() -> None:
    for rank in (6, 10**8):
        with pytest.raises(ConfigError, match="7 -> 5 "):
            inject(make(), AdapterConfig(r=rank))
    layer = nn.Embedding(10**6, 10**6, device="meta")
    with pytest.raises(ConfigError, match="rank above 1000000"):
        inject(layer, AdapterConfig(r=10**8))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_half_precision_and_autocast(kind: str) -> None:
    exact = trained(make(**LAYERS["both"]), **VARIANTS[kind])
    want = exact(TOKENS)
    half = trained(make(torch.bfloat16, **LAYERS["both"]), **VARIANTS[kind])
    half.load_state_dict(exact.state_dict())
    got = half(TOKENS)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=0.02)
    single = trained(make(torch.float32, **LAYERS["both"]), **VARIANTS[kind])
    single.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = single(TOKENS)
    assert y.dtype == torch.float32  # as the base's own forward: torch does not cast a look-up
    torch.testing.assert_close(y.double(), want, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert single.slots()["default"].up.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
def test_one_graph_under_compile() -> None:
    layer = trained(make(torch.float32, **LAYERS["both"]), dora=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS), layer(TOKENS))
    A = layer.slots()["default"].down.weight
    torch.testing.assert_close(
        torch.autograd.grad(compiled(TOKENS).square().sum(), A),
        torch.autograd.grad(layer(TOKENS).square().sum(), A),
    )


@pytest.mark.parametrize("variant", ["lora", "gated", "dora"])
@pytest.mark.parametrize("options", ["plain", "both"])
def test_gradients_of_mixed_rows_are_those_of_separate_batches(options: str, variant: str) -> None:
    layer = trained(make(**LAYERS[options]), "a", **VARIANTS[variant])
    trained(layer, "b", seed=1, **VARIANTS[variant])
    trained(layer, "c", seed=2, **VARIANTS[variant])
    rows = {"a": [0, 3], "b": [1], None: [2]}
    tokens = torch.cat([TOKENS, TOKENS.flip(1)[:1]])
    dy = torch.randn(4, 5, 5).double()
    (layer(tokens, task=["a", "b", None, "a"]) * dy).sum().backward()
    for task in ("a", "b"):
        own = [owner.weight for owner in layer.owners(task).values()]
        wanted = torch.autograd.grad((layer(tokens[rows[task]], task=task) * dy[rows[task]]).sum(), own)
        torch.testing.assert_close([weight.grad for weight in own], list(wanted))
    assert all(owner.weight.grad is None for owner in layer.owners("c").values())


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_mixed_rows_in_half_precision_are_the_tasks_own_bits(variant: str) -> None:
    layer = trained(trained(make(torch.bfloat16), "a", **VARIANTS[variant]), "b", seed=1, **VARIANTS[variant])
    one = {task: layer(TOKENS, task=task) for task in ("a", "b", None)}
    mixed = layer(TOKENS, task=["b", "a", None])
    assert torch.equal(mixed, torch.stack([one["b"][0], one["a"][1], one[None][2]]))
    beams = layer(TOKENS.repeat_interleave(2, 0), task=["b", "a", None])
    assert torch.equal(beams, mixed.repeat_interleave(2, 0))

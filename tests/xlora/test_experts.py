"""Which experts a mixture takes: of every kind, rank and place against their equations; the others refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orbit.adapter import AdapterConfig, inject, merge, set_route, tasks
from orbit.xlora import XLoRAError, mix, xLoRAConfig
from tests.xlora.oracle import HIDDEN, VOCABULARY, llama, mixture, same_as_dense, tokens


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    size = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval()


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def biased() -> Any:
    return llama(attention_bias=True, mlp_bias=True)


QV = ("q_proj", "v_proj")
KINDS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "dora": (llama, {"a": {"dora": True}, "b": {"dora": True, "r": 2}}),
    "dora on biases": (biased, {"a": {"dora": True}, "b": {"r": 2}}),
    "ranks and targets": (
        llama,
        {"a": {"dora": True}, "b": {"r": 2, "targets": QV}, "c": {"r": 8, "targets": ("up_proj",)}},
    ),
    "rslora": (llama, {"a": {"rslora": True}, "b": {"r": 9, "rslora": True, "targets": QV}}),
    "gated": (llama, {"a": {"gated": True}, "b": {"gated": True, "dora": True, "r": 2}}),
    "pissa and olora": (llama, {"a": {"init": "pissa"}, "b": {"init": "olora", "targets": QV}}),
    "embedding": (
        llama,
        {"a": {"targets": ("embed_tokens", "q_proj")}, "b": {"targets": ("embed_tokens",), "r": 2}},
    ),
    "dora embedding": (llama, {"a": {"targets": ("embed_tokens",), "dora": True}, "b": {"r": 2}}),
    "head": (llama, {"a": {"targets": ("lm_head",)}, "b": {"targets": ("lm_head", "q_proj"), "dora": True}}),
    "tied embedding": (
        tied,
        {"a": {"targets": ("embed_tokens",)}, "b": {"targets": ("embed_tokens", "q_proj"), "r": 2}},
    ),
    "tied head": (tied, {"a": {"targets": ("lm_head",)}, "b": {"targets": ("embed_tokens",), "r": 2}}),
    "conv1d": (
        gpt2,
        {"a": {"targets": ("c_attn", "c_proj")}, "b": {"targets": ("c_attn", "c_fc"), "dora": True, "r": 2}},
    ),
    "positions": (gpt2, {"a": {"targets": ("wpe", "wte")}, "b": {"targets": ("c_attn",)}}),
}


@pytest.mark.parametrize(("base", "experts"), KINDS.values(), ids=KINDS)
def test_experts_of_every_kind_are_their_equations(base: Any, experts: dict[str, dict[str, Any]]):
    same_as_dense(mixture(base(), experts, layerwise_scalings=True), base(), tokens())


def test_one_expert_is_scaled_too():
    same_as_dense(mixture(None, {"a": {}}, enable_softmax=False), llama(), tokens())


def test_any_name_is_an_expert():
    names = {"a.b": {}, "keys": {"r": 2}, "train": {}, "Ünïcode 1": {"targets": QV}, "0": {}}
    mixed = mixture(None, names)
    assert mixed.xlora_experts == tuple(names)
    same_as_dense(mixed, llama(), tokens())


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "lora_only"},
        {"bias": "all", "targets": QV},
        {"tokens": (1, 2, 40)},
        {"tokens": (41, 60), "targets": ()},
        {"save_modules": ("lm_head",)},
        {"save_modules": ("norm", "mlp"), "targets": QV},
    ],
    ids=str,
)
def test_whatever_else_an_expert_trains_is_scaled_as_a_whole(options: dict[str, Any]):
    """With a classifier that always picks expert a, the mixture is the task a; and half of it is neither."""
    mixed, ids = mixture(biased(), {"a": options, "b": {"r": 2}}).double(), tokens()
    with torch.no_grad():
        mixed.xlora_classifier.layers[0].weight.zero_()
        mixed.xlora_classifier.layers[0].bias.copy_(torch.tensor([1e3, 0.0]))
    alone = mixed(ids, task="a").logits
    assert (alone - mixed(ids).logits).abs().max() < 1e-12
    assert (alone - mixed(ids, task=None).logits).abs().max() > 0.01
    with torch.no_grad():
        mixed.xlora_classifier.layers[0].bias.zero_()
    half = mixed(ids, tasks={"a": 0.5, "b": 0.5}).logits
    torch.testing.assert_close(mixed(ids).logits, half, rtol=0, atol=1e-10)


def test_dropout_of_experts_is_drawn_in_training_alone():
    mixed, ids = mixture(None, {"a": {"dropout": 0.5}, "b": {"r": 2}}), tokens()
    assert torch.equal(mixed(ids).logits, mixed(ids).logits)
    mixed.train()
    assert (mixed(ids).logits - mixed(ids).logits).abs().max() > 0.01
    same_as_dense(mixed.eval(), llama(), ids)


def test_padding_rows_of_an_embedding_give_experts_no_gradient():
    mixed, ids = mixture(None, {"a": {"targets": ("embed_tokens",)}, "b": {"r": 2}}), tokens()
    mixed.set_use_trainable_adapters(True)
    ids[:, 0] = mixed.config.pad_token_id
    mixed(ids).logits.square().sum().backward()
    gradient = mixed.get_input_embeddings().low_rank_slot("a").down.weight.grad
    assert gradient[:, mixed.config.pad_token_id].abs().max() == 0
    assert gradient[:, ids[0, 1]].abs().max() > 0


# -- refusals ------------------------------------------------------------------------------------------------


class Convolved(nn.Module):
    """A stand-in for a decoder layer's child that mixes positions, as Mamba's does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(7)
    size = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**size, **heads)).eval()


def with_child(child: nn.Module) -> Any:
    model = llama()
    model.model.layers[0].mlp = child
    return model


@pytest.mark.parametrize(
    ("base", "options", "named"),
    [
        (
            lambda: with_child(Convolved()),
            {"targets": ("conv", "q_proj")},
            "'model.layers.0.mlp.conv'.*mixes positions",
        ),
        (
            lambda: with_child(Attending()),
            {"targets": ("attention",)},
            "'model.layers.0.mlp.attention'.*as a whole",
        ),
        (
            mixtral,
            {"parameters": ("experts.down_proj",), "targets": ()},
            "'model.layers.0.mlp.experts'.*as a whole",
        ),
        (llama, {"save_modules": ("self_attn",), "targets": ()}, "'model.layers.0.self_attn'.*cache"),
    ],
    ids=["conv", "attention", "parameters", "saved attention"],
)
def test_layers_without_a_scaling_per_token_are_refused(base: Any, options: dict[str, Any], named: str):
    model = base()
    inject(model, AdapterConfig(r=2), "fine")
    inject(model, AdapterConfig(r=2, **options), "odd")
    trained, cls = {n: p.requires_grad for n, p in model.named_parameters()}, type(model)
    with pytest.raises(XLoRAError, match=f"(?s)expert 'odd' adapts {named}"):
        mix(model, ("fine", "odd"), xLoRAConfig(HIDDEN))
    assert type(model) is cls
    assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
    mix(model, ("fine",), xLoRAConfig(HIDDEN))  # which the others do not stand in the way of
    assert model(tokens()).logits.isfinite().all()


def test_a_tower_beside_the_decoder_is_refused():
    model = llama()
    model.model.tower = nn.Linear(HIDDEN, HIDDEN)
    model.get_decoder = lambda: decoder
    decoder = model.model.layers[0]
    inject(model, AdapterConfig(r=2, targets=("tower",)), "odd")
    with pytest.raises(XLoRAError, match="'model.tower'.*outside of the LlamaDecoderLayer"):
        mix(model, ("odd",), xLoRAConfig(HIDDEN))


def seeing() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(7)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    vision = CLIPVisionConfig(hidden_size=16, image_size=8, patch_size=4, projection_dim=16, **heads)
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, pad_token_id=0, **heads)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=VOCABULARY - 1)
    ).eval()


def test_the_scaling_pass_sees_the_images_that_the_model_sees():
    options = {"targets": ("language_model.*.q_proj",), "exclude": ("vision_tower",)}
    mixed = mixture(seeing(), {"a": options, "b": options})
    ids = tokens().clamp(max=VOCABULARY - 2)
    ids[:, 1:5] = VOCABULARY - 1  # the patches of an image
    black, white = torch.zeros(3, 3, 8, 8), torch.ones(3, 3, 8, 8)
    mixed(input_ids=ids, pixel_values=black)
    first = mixed.get_latest_scalings()
    mixed(input_ids=ids, pixel_values=white)
    moved = (mixed.get_latest_scalings() - first).abs().amax((0, 2, 3))
    assert moved[0] == 0
    assert (moved[1:] > 0).all()
    with mixed.disable():
        hidden = mixed.model(input_ids=ids, pixel_values=white).last_hidden_state
    torch.testing.assert_close(
        mixed.get_latest_scalings(), mixed.xlora_classifier(hidden, mixed.xlora_config)
    )


class Halved(nn.Module):
    """Gives some of the tokens to its layer, in an order of its own."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.inner, self.flat = nn.Linear(HIDDEN, HIDDEN), flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        some = x[:, ::2]
        return x + self.inner(some.flatten(0, 1) if self.flat else some).mean()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("options", [{}, {"init": "pissa"}], ids=["lora", "pissa"])
def test_a_layer_that_does_not_see_the_tokens_is_named_when_it_runs(flat: bool, options: dict[str, Any]):
    mixed = mixture(with_child(Halved(flat)), {"a": options})
    with pytest.raises(XLoRAError, match=r"model.layers.0.mlp.inner: scalings for .* = \(3, 9\) do not fit"):
        mixed(tokens())
    with mixed.disable():
        mixed(tokens())


def test_experts_that_are_none():
    model = llama()
    with pytest.raises(XLoRAError, match="at least one expert"):
        mix(model, (), xLoRAConfig(HIDDEN))
    inject(model, AdapterConfig(r=2), "a")
    with pytest.raises(XLoRAError, match="no task 'b' to be an expert; the model has \\['a'\\]"):
        mix(model, ("a", "b"), xLoRAConfig(HIDDEN))
    with pytest.raises(XLoRAError, match="names one twice"):
        mix(model, ("a", "a"), xLoRAConfig(HIDDEN))
    set_route(model, "a")
    merge(model, "a")
    with pytest.raises(XLoRAError, match="'a' is merged"):
        mix(model, ("a",), xLoRAConfig(HIDDEN))
    assert tasks(model) == ("a",)


def test_experts_on_an_int8_base():
    quantization = pytest.importorskip("torchao.quantization")
    model = llama()
    for layer in model.model.layers:
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig(version=2))
    ids = tokens()
    base = model(ids).logits
    mixed = mixture(model, {"a": {}, "b": {"r": 2, "dora": True}}, layerwise_scalings=True)
    mixed.set_use_trainable_adapters(True)
    output = mixed(ids, labels=ids)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixed.parameters() if p.requires_grad)
    with mixed.disable():
        assert torch.equal(mixed(ids).logits, base)
    plain = llama()
    for name, layer in plain.model.layers.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = model.model.layers.get_submodule(name).weight.dequantize()
    twin = mixture(plain, {"a": {}, "b": {"r": 2, "dora": True}}, layerwise_scalings=True)
    torch.testing.assert_close(output.logits, twin(ids).logits, rtol=1e-3, atol=1e-3)

"""Mixtures of every family of causal language models, tiny and random: cached generation equals uncached.

Where a family's keys change with what comes later, generation goes without a cache and says so; where it has no cache
of keys and values, it asks to be told to.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orbit.adapter import AdapterConfig, inject
from orbit.adapter.errors import AdapterError
from orbit.xlora import CacheError, XLoRAError, mix, xLoRAConfig
from tests.xlora.generating import EXPERTS, VOCABULARY, by_whole_passes, llama, mixed, tokens

STEPS = 8
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": STEPS, "max_new_tokens": STEPS}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODERN = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERT_SIZES = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, tuple[str, Mapping[str, Any], Any]] = {
    "llama": ("Llama", MODERN, None),
    "mistral": ("Mistral", MODERN | {"sliding_window": 5}, None),
    "qwen2": (
        "Qwen2",
        MODERN | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        None,
    ),
    "qwen3": ("Qwen3", MODERN | {"head_dim": 8}, None),
    "gemma": ("Gemma", MODERN | {"head_dim": 8}, None),
    "gemma2": ("Gemma2", MODERN | {"head_dim": 8, "sliding_window": 5}, None),
    "gemma3": ("Gemma3", MODERN | {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 3}, None),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, None),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, None),
    "opt, projected": (
        "OPT",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 24, "max_position_embeddings": 64},
        None,
    ),
    "neox": ("GPTNeoX", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}, None),
    "phi": ("Phi", MODERN, None),
    "phi3": ("Phi3", MODERN | {"original_max_position_embeddings": 64}, None),
    "falcon": ("Falcon", {**SIZES, "alibi": False, "max_position_embeddings": 64}, None),
    "falcon, alibi": ("Falcon", {**SIZES, "alibi": True, "multi_query": False}, None),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}, None),
    "mixtral": ("Mixtral", MODERN | {"num_local_experts": 4}, ATTENTION),
    "olmoe": ("Olmoe", MODERN | {"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
    "qwen3-moe": ("Qwen3Moe", MODERN | {"head_dim": 8} | EXPERT_SIZES, ATTENTION),
    "stablelm": ("StableLm", MODERN, None),
    "cohere": ("Cohere", MODERN, None),
    "granite": ("Granite", MODERN, None),
    "olmo2": ("Olmo2", MODERN, None),
    "starcoder2": ("Starcoder2", MODERN | {"sliding_window": 5}, None),
    "llama, yarn": ("Llama", MODERN | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
}


def made(family: str, settings: Mapping[str, Any], head: str | None = None) -> nn.Module:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    head = head or ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    return getattr(transformers, family + head)(config(**common | dict(settings))).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached(family: str) -> None:
    name, settings, targets = FAMILIES[family]
    mixture = mixed(made(name, settings), targets=targets)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = mixture(ids, use_cache=False).logits
        with mixture.disable():
            base = mixture(ids, use_cache=False).logits
    assert (whole - base).abs().max() > 1e-4
    found = mixture.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS, mask, bare=True))
    beams = {"attention_mask": mask, "num_beams": 3} | GREEDY
    assert torch.equal(mixture.generate(ids, **beams), mixture.generate(ids, use_cache=False, **beams))
    cache, steps = None, []
    with torch.no_grad():
        for column in ids.split(1, 1):
            output = mixture(column, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_assisted_with_sliding_windows(family: str) -> None:
    name, settings, targets = FAMILIES[family]
    mixture = mixed(made(name, settings), targets=targets)
    ids = tokens(1, 9).repeat(1, 2)
    settings = {"prompt_lookup_num_tokens": 4, "do_sample": False, "max_new_tokens": 24}
    whole = by_whole_passes(mixture, ids, 24)
    assert torch.equal(mixture.generate(ids, **settings), whole)
    with torch.no_grad():
        begun = mixture(ids[:, :8]).past_key_values
    assert torch.equal(mixture.generate(ids, past_key_values=begun, **settings), whole)


class Routed(nn.Module):
    """Experts of the model's own, each of which is given the tokens that chose it, and one that is given all."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, 2, bias=False)
        self.shared = nn.Linear(size, size)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, -2)
        chosen = self.gate(flat).argmax(-1)
        out = self.shared(flat)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0].flip(0)
            if len(rows):
                out[rows] += expert(flat[rows])
        return out.view_as(hidden)


def routed() -> Any:
    model: Any = llama()
    model.model.layers[1].mlp = Routed(32)
    return model


@pytest.mark.parametrize("all_to_one", [False, True])
def test_experts_of_the_models_own_are_refused(all_to_one: bool) -> None:
    model = routed()
    if all_to_one:  # as many rows as tokens, in another order
        model.model.layers[1].mlp.gate.weight.data.zero_()
    mixture = mixed(model, targets=("q_proj", "experts.*"))
    with pytest.raises(XLoRAError, match=r"model\.layers\.1\.mlp\.experts\.\d.*exclude=\('model"):
        mixture(tokens())
    allowed = mixed(routed(), targets=("q_proj", "shared"))
    ids = tokens()
    assert torch.equal(allowed.generate(ids, **GREEDY), by_whole_passes(allowed, ids, STEPS))


ROPE = {"rope_type": "dynamic", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
INEXACT = {
    "dynamic RoPE": (
        "Llama",
        MODERN | {"max_position_embeddings": 8, "rope_parameters": ROPE},
        "'dynamic' RoPE",
    ),
    "long RoPE": (
        "Phi3",
        MODERN
        | {"max_position_embeddings": 64, "original_max_position_embeddings": 10, "rope_parameters": LONG},
        "'longrope' RoPE",
    ),
    "bidirectional": (
        "Gemma3",
        MODERN | {"head_dim": 8, "use_bidirectional_attention": True},
        "bidirectional",
    ),
}


@pytest.mark.parametrize("kind", INEXACT)
def test_inexact_caches_are_left_out_and_said_once(kind: str) -> None:
    family, settings, why = INEXACT[kind]
    mixture = mixed(made(family, settings))
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    with pytest.warns(UserWarning, match=f"generates without a cache.*{why}") as said:
        found = mixture.generate(ids, attention_mask=mask, **GREEDY)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = mixture.generate(ids, attention_mask=mask, **GREEDY)
    expected = by_whole_passes(mixture, ids, STEPS, mask, bare=True)
    assert torch.equal(found, again)
    assert torch.equal(found, expected)
    with pytest.raises(CacheError, match=f"{why}.*use_cache=False"):
        mixture(ids, use_cache=True)
    with torch.no_grad():
        assert mixture(ids).past_key_values is None
    with mixture.disable(), warnings.catch_warnings():
        warnings.simplefilter("error")
        mixture.generate(ids, attention_mask=mask, **GREEDY)


def test_a_bert_that_sees_both_ways() -> None:
    mixture = mixed(made("Bert", MODERN | {"is_decoder": False}, "LMHeadModel"), targets=("query", "value"))
    with pytest.warns(UserWarning, match="bidirectional"):
        mixture.generate(tokens(), **GREEDY)
    causal = mixed(made("Bert", MODERN | {"is_decoder": True}, "LMHeadModel"), targets=("query", "value"))
    ids = tokens()
    found = causal.generate(ids, **GREEDY)
    assert torch.equal(found, by_whole_passes(causal, ids, STEPS, bare=True))


STATEFUL = {
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, ("in_proj",)),
    "rwkv": (
        "Rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        ("key", "value"),
    ),
}


@pytest.mark.parametrize("family", STATEFUL)
def test_models_without_keys_and_values(family: str) -> None:
    name, settings, targets = STATEFUL[family]
    mixture = mixed(made(name, settings), targets=targets)
    ids = tokens()
    before = {key: value.clone() for key, value in mixture.state_dict().items()}
    with pytest.raises(CacheError, match=r"no cache of keys and values.*generate\(\.\.\., use_cache=False\)"):
        mixture.generate(ids, **GREEDY)
    assert all(torch.equal(value, before[key]) for key, value in mixture.state_dict().items())
    found = mixture.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(found, by_whole_passes(mixture, ids, STEPS, bare=True))
    with mixture.disable(), torch.no_grad():
        state = mixture(ids, use_cache=True)
    kept = "state" if name == "Rwkv" else "cache_params"
    with pytest.raises(CacheError, match=f"{kept}= is a state"):
        mixture(ids, **{kept: state[kept]})
    with pytest.raises(CacheError, match="use_cache=False"):
        mixture(ids, use_cache=True)


HYBRIDS = {
    "qwen3-next": (
        "Qwen3Next",
        MODERN
        | EXPERT_SIZES
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
        }
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "lfm2": ("Lfm2", MODERN | {"layer_types": ["conv", "full_attention"]}),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_of_attention_and_states(family: str) -> None:
    name, settings = HYBRIDS[family]
    mixture = mixed(made(name, settings), targets=("q_proj", "v_proj"))
    ids = tokens()
    mask = torch.ones_like(ids)
    for beams in (1, 3):
        generation = {"attention_mask": mask, "num_beams": beams} | GREEDY
        found = mixture.generate(ids, **generation)
        assert torch.equal(found, mixture.generate(ids, use_cache=False, **generation))


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, vocab_size=VOCABULARY
    )
    model = transformers.T5ForConditionalGeneration(config)
    for expert in EXPERTS:
        inject(model, AdapterConfig(r=2, targets=("q",)), expert)
    kind, trains = type(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(XLoRAError, match="has an encoder and a decoder"):
        mix(model, EXPERTS, xLoRAConfig(32))
    assert type(model) is kind
    assert [p.requires_grad for p in model.parameters()] == trains
    assert issubclass(XLoRAError, AdapterError)

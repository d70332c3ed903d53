"""The decoder's settings: defaults, what is refused, what is read from transformers."""

import json

import pytest
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from orbit.model import SettingError, TransformerConfig

SIZES = {"vocab_size": 100, "hidden_size": 96, "num_layers": 2, "num_heads": 6}


def test_defaults():
    config = TransformerConfig(**SIZES)
    assert (config.num_kv_heads, config.head_dim, config.intermediate_size) == (6, 16, 256)
    assert config.eos_token_ids == ()
    assert TransformerConfig(**SIZES, eos_token_id=3).eos_token_ids == (3,)
    assert TransformerConfig(**SIZES, eos_token_id=(3, 4)).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (
            {"hidden_size": 100},
            "hidden_size 100 is no multiple of num_heads 6: choose 96 or 102, or give head_dim=",
        ),
        ({"num_layers": 0}, "num_layers 0 is no size"),
        ({"vocab_size": 10.5}, "vocab_size 10.5 is no size"),
        ({"window": 0}, "window 0 is no size"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token 3 exceeds num_experts 2"),
        ({"norm_eps": -1.0}, "norm_eps -1.0 is below 0"),
        ({"balance_weight": float("nan")}, "balance_weight nan is below 0"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"rope_scaling": {"rope_type": "liner", "factor": 2.0}}, "rope_type 'liner' is unknown"),
    ],
)
def test_what_is_refused(wrong, why):
    with pytest.raises(SettingError, match=why):
        TransformerConfig(**{**SIZES, **wrong})


def test_a_llama_is_read_alike_from_object_dict_and_folder(tmp_path):
    llama = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        intermediate_size=80,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        eos_token_id=[1, 2],
        pad_token_id=0,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    wanted = TransformerConfig(
        vocab_size=50,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        intermediate_size=80,
        max_length=512,
        rope_base=5e5,
        norm_eps=1e-5,
        tie_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        eos_token_id=(1, 2),
        pad_token_id=0,
    )
    llama.save_pretrained(tmp_path)
    for source in (llama, llama.to_dict(), tmp_path, str(tmp_path)):
        assert TransformerConfig.from_llama(source) == wanted


def test_old_files_name_rope_otherwise():
    old = {
        **{k: v for k, v in LlamaConfig().to_dict().items() if k != "rope_parameters"},
        "rope_theta": 7e3,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    config = TransformerConfig.from_llama(old)
    assert (config.rope_base, config.rope_scaling) == (7e3, {"rope_type": "linear", "factor": 2.0})
    assert config.max_length is None
    assert TransformerConfig.from_llama({**old, "rope_scaling": None}).rope_scaling is None
    assert TransformerConfig.from_llama({**old, "pad_token_id": -1}).pad_token_id is None
    assert TransformerConfig.from_llama({**old, "pad_token_id": 0}).pad_token_id == 0


def test_mistral_has_a_window_and_qwen3_normed_heads():
    assert TransformerConfig.from_llama(MistralConfig(sliding_window=32)).window == 32
    assert TransformerConfig.from_llama(MistralConfig(sliding_window=None)).window is None
    assert TransformerConfig.from_llama(Qwen3Config()).qk_norm
    assert not TransformerConfig.from_llama(LlamaConfig()).qk_norm


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (GPT2Config(), "model_type 'gpt2' is no Llama: llama, mistral, qwen3 can be read"),
        (Qwen3Config(use_sliding_window=True, sliding_window=8), "a window in some layers only"),
        ({"vocab_size": 3}, "needs hidden_size, num_hidden_layers"),
        ({**LlamaConfig().to_dict(), "quantization_config": {"bits": 4}}, "the weights are packed"),
        ({**LlamaConfig().to_dict(), "rope_parameters": {"rope_type": "longrope"}}, "'longrope' is unknown"),
        (
            {
                **LlamaConfig().to_dict(),
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
            },
            "rotated in part",
        ),
        (3, "int is no config"),
    ],
)
def test_what_cannot_be_read_is_refused(source, why):
    with pytest.raises(SettingError, match=why):
        TransformerConfig.from_llama(source)


@pytest.mark.parametrize("content", ["", "[1]", "[" * 100_000])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SettingError, match=r"config\.json"):
        TransformerConfig.from_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig().to_dict()))
    assert TransformerConfig.from_llama(tmp_path).num_layers == 32

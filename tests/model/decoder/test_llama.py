"""Weights of a Llama: equal logits, and nothing loaded that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from orbit.demo.smollm2 import smollm2
from orbit.model import SettingError, Transformer, TransformerConfig, WeightsError, load_llama_weights
from tests.model.decoder.llamas import llama, ours, prompts


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


SCALINGS = {
    "linear": rope("linear", factor=3.0),
    "dynamic": rope("dynamic", factor=2.0),
    "yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"rms_norm_eps": 1e-2},
        {"kind": "mistral", "sliding_window": 5},
        {"kind": "qwen3", "rms_norm_eps": 1e-2},
        *SCALINGS.values(),
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers(settings):
    settings = {"initializer_range": 0.1, **settings}
    theirs = llama(**settings)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too
            parameter += 0.05 * torch.randn_like(parameter)
    model = ours(theirs)
    for padding in (0, 5):
        ids, mask = prompts(length=40, padding=padding)
        with torch.no_grad():
            wanted, found = theirs(ids, attention_mask=mask).logits, model(ids, mask).logits
        real = mask.bool()
        assert wanted[real].abs().max() > 0.3
        torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=0)


def test_dynamic_scaling_beyond_the_trained_length():
    theirs = llama(initializer_range=0.1, **SCALINGS["dynamic"])
    ids, _ = prompts(length=100)
    with torch.no_grad():
        torch.testing.assert_close(ours(theirs)(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_loss_and_gradients_equal_those_of_transformers():
    theirs = llama(
        attention_bias=True, pad_token_id=None
    ).double()  # else its embedding learns nothing of that token
    model = load_llama_weights(
        Transformer(TransformerConfig.from_llama(theirs.config), dtype=torch.float64), theirs
    )
    ids, mask = prompts(padding=3)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # padding would predict it
    labels[1, :4] = -100
    wanted, found = theirs(ids, attention_mask=mask, labels=labels), model(ids, mask, labels)
    torch.testing.assert_close(found.loss.float(), wanted.loss, atol=1e-6, rtol=0)
    wanted.loss.backward()
    found.loss.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.fixture
def theirs():
    return llama()


def fresh(theirs, **settings):
    torch.manual_seed(9)
    config = TransformerConfig.from_llama(theirs.config)
    return Transformer(TransformerConfig(**{**vars(config), **settings}))


def same(model, theirs):
    return all(torch.equal(model.get_parameter(name), value) for name, value in theirs.named_parameters())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_from_a_folder(tmp_path, shards, tied):
    theirs = llama(tie_word_embeddings=tied)
    size = sum(p.numel() for p in theirs.parameters()) * 4
    theirs.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    model = fresh(theirs)
    assert load_llama_weights(model, tmp_path) is model
    assert same(model, theirs)
    assert same(load_llama_weights(fresh(theirs), str(tmp_path)), theirs)


def test_from_a_state_dict_in_the_models_own_dtype(theirs):
    state = {
        **theirs.state_dict(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }  # of old files
    assert same(load_llama_weights(fresh(theirs), state), theirs)
    model = load_llama_weights(fresh(theirs).bfloat16(), state)
    assert torch.equal(model.model.norm.weight, theirs.model.norm.weight.bfloat16())
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_tied_state_dict_has_its_head_twice():
    theirs = llama(tie_word_embeddings=True)
    assert same(load_llama_weights(fresh(theirs), theirs.state_dict()), theirs)


def test_onto_a_model_made_without_storage(theirs):
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_llama(theirs.config))
    with pytest.raises(WeightsError, match="meta device"):
        load_llama_weights(model, theirs)
    model.to_empty(device="cpu")
    assert same(load_llama_weights(model, theirs), theirs)
    ids, _ = prompts()
    torch.testing.assert_close(model.eval()(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.pop(NAME), rf"{NAME} is missing, and 0 more"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is unexpected, and 0 more"),
        (lambda s: s.update({NAME: torch.ones(3, 4)}), rf"{NAME} has the shape \(3, 4\)"),
        (
            lambda s: s.pop("lm_head.weight"),
            "the source is tied, so build the model with tie_embeddings=True",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(theirs, tmp_path, change, why):
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    change(state)
    model = fresh(theirs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    for source in (state, tmp_path):
        with pytest.raises(WeightsError, match=why):
            load_llama_weights(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_source_that_is_not_tied_is_refused_by_a_tied_model(theirs):
    with pytest.raises(WeightsError, match="build the model with tie_embeddings=False"):
        load_llama_weights(fresh(theirs, tie_embeddings=True), theirs.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"rope_base": 5e5},
        {"norm_eps": 1e-3},
        {"window": 4},
        {"num_kv_heads": 1, "num_heads": 2, "head_dim": 16},
    ],
)
def test_settings_that_the_weights_do_not_show_are_compared(theirs, tmp_path, other):
    theirs.save_pretrained(tmp_path)
    for source in (theirs, tmp_path):
        with pytest.raises(SettingError, match=next(iter(other)).replace("num_kv_heads", "num_heads")):
            load_llama_weights(fresh(theirs, **other), source)


def test_damaged_folders(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size=20_000)
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    shard = tmp_path / sorted(set(found["weight_map"].values()))[0]

    def refused(why):
        with pytest.raises(WeightsError, match=why):
            load_llama_weights(fresh(theirs), tmp_path)

    outside = tmp_path.parent / "outside.safetensors"
    shard.rename(outside)
    refused("names .*, which is not in the folder")
    found["weight_map"] = {name: "../outside.safetensors" for name in found["weight_map"]}
    index.write_text(json.dumps(found))
    refused("names .*, which is not in the folder")
    for broken in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(broken)
        refused("does not say in which files")
    index.unlink()
    refused(r"has no model\.safetensors")
    (tmp_path / "model.safetensors").write_bytes(outside.read_bytes()[:-8])
    refused("is no readable safetensors file")
    save_file({**load_file(outside), "x": torch.ones(1)}, tmp_path / "model.safetensors")
    refused("is missing")
    with pytest.raises(WeightsError, match="not from int"):
        load_llama_weights(fresh(theirs), 3)


@pytest.mark.slow
def test_smollm2_is_the_same_in_our_blocks():
    """135M parameters, 30 layers: logits, and greedy text token for token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = load_llama_weights(Transformer(TransformerConfig.from_llama(folder)), folder).eval()
    texts = ["The capital of France is", "Once upon a time there was a", "2 + 2 ="]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted, found = theirs(**batch).logits, model(**batch).logits
    real = batch["attention_mask"].bool()
    apart = (found - wanted)[real].abs().max().item()
    assert apart < 1e-4, apart
    generated = model.generate(**batch, max_new_tokens=24)
    assert torch.equal(generated, theirs.generate(**batch, max_new_tokens=24, do_sample=False))
    assert "Paris" in tokenizer.decode(generated[0])

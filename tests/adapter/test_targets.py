"""Which layers a target means, and what an unmatched one says."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from orbit.adapter import AdapterConfig, ConfigError, TargetError, inject, load, save
from orbit.adapter.targets import matches, resolve

Make = Callable[..., nn.Module]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def names(
    model: nn.Module, *targets: str, exclude: tuple[str, ...] = (), numbers: tuple[int, ...] | None = None
) -> list[str]:
    layers, _ = resolve(model, targets or None, exclude, numbers)
    return [name.removeprefix("model.layers.") for name in layers]


def test_grammar(llama: Make) -> None:
    model = llama()
    assert names(model, "q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert names(model, "layers.1.self_attn.q_proj") == ["1.self_attn.q_proj"]
    assert names(model, "mlp") == [f"{i}.mlp.{n}" for i in range(2) for n in MLP]
    assert names(model, "layers.0") == [f"0.self_attn.{n}" for n in ATTENTION] + [f"0.mlp.{n}" for n in MLP]
    assert names(model, "layers.*.q_proj") == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    assert names(model, "[qv]_proj") == [f"{i}.self_attn.{n}" for i in range(2) for n in ("q_proj", "v_proj")]
    assert names(model, r"re:.*\.1\..*(gate|up)_proj") == ["1.mlp.gate_proj", "1.mlp.up_proj"]
    assert names(model, "lm_head") == ["lm_head"]
    assert names(model, "v_proj", "q_proj")[0] == "0.self_attn.q_proj"  # in the model's order
    assert names(model, "layers", exclude=("mlp", "layers.0")) == [f"1.self_attn.{n}" for n in ATTENTION]


def test_nothing_is_found_by_substring() -> None:
    assert matches("q_proj", ["a.eq_proj", "q_proj.b", "a.q_proj.x"]) == []
    assert matches("1", ["1", "a.1", "10", "a.11"]) == ["1", "a.1"]


def test_a_container_is_not_its_namesake_with_another_digit() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(12))})
    assert [name for name in resolve(model, ["layers.1"])[0]] == ["layers.1.0"]


def test_none_is_everything_but_the_head(llama: Make, mlp: Make) -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    report = inject(llama(), AdapterConfig(r=2))
    assert len(report.layers) == 14
    assert set(report.skipped) == {"lm_head"}
    assert names(mlp()) == ["0", "2"]
    assert names(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))) == ["1"]
    bert = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
    )
    classifier = BertForSequenceClassification(bert)
    assert "classifier" not in names(classifier)
    assert "bert.pooler.dense" in names(classifier)
    assert "pooler.dense" in names(BertModel(bert))  # no head: nothing is left out
    assert names(classifier, "classifier") == ["classifier"]


def test_unmatched_targets_say_what_is_near(llama: Make) -> None:
    model = llama()
    for target, said in [
        ("q_porj", "target 'q_porj' matched 0 of 16 Embedding/Linear layers; did you mean 'q_proj' (2)?"),
        (
            "self_attn.q_prj",
            "target 'self_attn.q_prj' matched 0 of 16 Embedding/Linear layers; did you mean 'self_attn.q_proj' (2)?",
        ),
        ("xyzzy", "their names end in 'down_proj', 'embed_tokens', 'gate_proj'"),
        ("norm", "it names 1 module(s) of class LlamaRMSNorm with none of them below"),
        ("re:[", "not a regular expression"),
    ]:
        with pytest.raises(TargetError, match=re.escape(said)):
            inject(model, AdapterConfig(targets=("v_proj", target)))
    with pytest.raises(TargetError, match=r"exclude 'qproj' matched 0 .* did you mean 'q_proj' \(2\)"):
        inject(model, AdapterConfig(exclude=("qproj",)))
    with pytest.raises(TargetError, match="no layer is left"):
        inject(model, AdapterConfig(targets=("mlp",), exclude=("layers",)))
    assert not any("lora" in name for name in model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pattern_that_takes_exponential_time_is_given_up(mlp: Make) -> None:
    model = nn.Sequential(OrderedDict({"a" * 50 + "b": mlp()}))
    start = time.process_time()
    with pytest.raises(TargetError, match=r"matching '\(a\|a\)\*' takes over 1 s"):
        inject(model, AdapterConfig(targets=("re:(a|a)*",)))
    with pytest.raises(ConfigError, match=r"rank_pattern or alpha_pattern: matching .* takes over 1 s"):
        inject(model, AdapterConfig(targets=("re:.*0",), rank_pattern={r"(a|a)*\W+": 2}))
    assert time.process_time() - start < 4
    assert not any("lora" in name for name in model.state_dict())


def test_shared_layers_are_one_layer() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(3, 3)})
    assert names(model, "re:.*") == ["a", "c"]


def test_convolutions_and_embeddings_are_adapted_where_they_are_named() -> None:
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(5, 4),
            "body": nn.ModuleDict(
                {"conv": nn.Conv2d(2, 2, 3), "lin": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
            ),
            "act": nn.ReLU(),
            "head": nn.Linear(4, 2),
            "out": nn.Conv1d(2, 2, 1),
        }
    )
    assert list(resolve(model, None)[0]) == ["body.lin"]
    assert resolve(model, None)[1] == {"head": "the head"}
    assert list(resolve(model, ["body"])[0]) == ["body.conv", "body.lin"]
    assert list(resolve(model, ["embed", "out"])[0]) == ["embed", "out"]
    assert list(resolve(model, ["re:body.*"])[0]) == ["body.conv", "body.lin"]
    assert list(resolve(nn.Conv1d(2, 2, 1), None)[0]) == [""]
    with pytest.raises(TargetError, match="to adapt its Conv2d, Embedding layers, name them"):
        resolve(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Embedding(4, 4)), None)


def test_a_named_leaf_of_no_known_kind_is_an_error_and_a_pattern_passes_it_by() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "b": nn.ModuleDict({"x": nn.LayerNorm(2)})}
    )
    with pytest.raises(TargetError, match=r"target 'x' names 'b\.x', a LayerNorm"):
        resolve(model, ["x"])
    assert list(resolve(model, ["*.x"])[0]) == ["a.x"]
    assert list(resolve(model, ["a", "a.x"])[0]) == ["a.x"]
    assert list(resolve(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()), ["0"])[0]) == ["0.0"]


def test_layers_by_number(llama: Make) -> None:
    model = llama(num_hidden_layers=3)
    assert names(model, "q_proj", numbers=(0, 2)) == [f"{i}.self_attn.q_proj" for i in (0, 2)]
    assert names(model, numbers=(1,)) == names(model, "layers.1")
    assert AdapterConfig(layers=1).layers == (1,)
    with pytest.raises(
        TargetError, match="layers names 3, and there is none of that number; there are: 0, 1, 2"
    ):
        inject(model, AdapterConfig(targets=("q_proj",), layers=(0, 3)))
    with pytest.raises(TargetError, match="there are: none of the targets lies in a numbered layer"):
        inject(model, AdapterConfig(targets=("lm_head",), layers=(0,)))
    for layers, said in [
        ([-1], "-1 is none"),
        ([], "not empty"),
        ("0", "whole numbers"),
        ([1, 1], "names 1 twice"),
    ]:
        with pytest.raises(ConfigError, match=said):
            AdapterConfig(layers=layers)
    assert not any("lora" in name for name in model.state_dict())


def test_numbers_are_the_first_of_a_name_and_hold_for_parameters_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, 4, 4))
            self.inner = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])

    model = nn.ModuleDict({"blocks": nn.ModuleList([Experts() for _ in range(3)])})
    report = inject(model, AdapterConfig(r=2, targets=("inner",), parameters=("up",), layers=(1,)))
    assert set(report.layers) == {"blocks.1.up", "blocks.1.inner.0", "blocks.1.inner.1"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_layers_to_transform(llama: Make, tokens: torch.Tensor, tmp_path: Path) -> None:
    """The same layers as PEFT's, and its files, which name more targets than they have."""
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    theirs = peft.get_peft_model(llama(num_hidden_layers=3), settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    theirs.eval().save_pretrained(tmp_path)
    model = llama(num_hidden_layers=3)
    ours = inject(llama(num_hidden_layers=3), AdapterConfig(r=2, targets=("q_proj", "up_proj"), layers=(1,)))
    assert load(model, tmp_path).layers == ours.layers
    torch.testing.assert_close(model(tokens).logits, theirs(input_ids=tokens).logits, rtol=0, atol=1e-5)
    save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path / "ours").eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)

"""What a mixture is not made of: an error that says what to do, and the model, with all about it, as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import orbit.xlora as xlora
from orbit.adapter import AdapterConfig, AdapterError, inject, set_trainable
from orbit.model import Transformer, TransformerConfig
from orbit.xlora import XLoRAError
from tests.xlora.folders import assert_same, base, experts, logits, mixture, photograph, write_expert
from tests.xlora.test_files import as_public

NAMES = ("math", "law", "art")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return experts(tmp_path_factory.mktemp("experts"), *NAMES)


@pytest.fixture(scope="module")
def written(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a mixture: ours, the public implementation's and PEFT's."""
    folder = tmp_path_factory.mktemp("written")
    model = mixture(folders)
    model.save_pretrained(folder / "ours")
    model.save_pretrained(folder / "peft", peft=True)
    as_public(model, folder / "public")
    return folder


def fresh() -> Any:
    """A base model in use: with a task that trains and is current, one layer in eval mode, a head that trains."""
    model = base().train()
    inject(model, AdapterConfig(r=2), "mine")
    set_trainable(model, "mine", True)
    model.lm_head.weight.requires_grad_(True)
    model.model.layers[1].eval()
    return model


def refused(call: Callable[[Any], Any], error: type[Exception], message: str, model: Any = None) -> None:
    for candidate in (fresh(), base()) if model is None else (model,):
        before = photograph(candidate)
        with pytest.raises(error, match=message) as caught:
            call(candidate)
        assert isinstance(caught.value, AdapterError)
        assert_same(before, photograph(candidate))


# -- add_xlora_to_model --------------------------------------------------------------------------------------

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "top_k of more than there are": ({"top_k_lora": 4}, r"top_k_lora=4\): there are only 3"),
    "top_k 0": ({"top_k_lora": 0}, "top_k_lora=0"),
    "top_k a bool": ({"top_k_lora": True}, "top_k_lora=True"),
    "temperature 0": ({"softmax_temperature": 0.0}, "softmax_temperature=0.0"),
    "temperature below 0": ({"softmax_temperature": -1}, "softmax_temperature=-1"),
    "temperature nan": ({"softmax_temperature": float("nan")}, "softmax_temperature=nan"),
    "depth 0": ({"xlora_depth": 0}, "xlora_depth=0"),
    "dropout 1": ({"xlora_dropout_p": 1.0}, "xlora_dropout_p=1.0"),
    "an endless scaling pass": ({"scaling_pass_value": float("inf")}, "scaling_pass_value=inf"),
    "another hidden size": ({"hidden_size": 64}, r"hidden_size=64\): the last hidden state .* 32"),
    "a device that is none": ({"device": "cudda"}, r"device='cudda'.*names no device"),
    "a device that is not here": ({"device": "cuda:99"}, r"device='cuda:99'"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting: str, folders: dict[str, Path]) -> None:
    config, message = SETTINGS[setting]

    def call(model: Any) -> None:
        xlora.add_xlora_to_model(model, xlora.xLoRAConfig(**{"hidden_size": 32, **config}), folders)

    refused(call, XLoRAError, message)


def test_settings_of_a_mixture_keep_the_rules(folders: dict[str, Path]) -> None:
    mixed = mixture(folders)
    for name, value in (("softmax_temperature", 0), ("top_k_lora", 0), ("scaling_pass_value", float("nan"))):
        before = getattr(mixed.xlora_config, name)
        with pytest.raises(XLoRAError, match=f"{name}={value}"):
            setattr(mixed.xlora_config, name, value)
        assert getattr(mixed.xlora_config, name) == before
    mixed.xlora_config.top_k_lora = 9
    with pytest.raises(XLoRAError, match="top_k_lora=9: there are only 3"):
        logits(mixed)


@pytest.mark.parametrize("config", [None, {"hidden_size": 32}, 32])
def test_settings_that_are_none(config: Any, folders: dict[str, Path]) -> None:
    refused(
        lambda model: xlora.add_xlora_to_model(model, config, folders), XLoRAError, "must be an xLoRAConfig"
    )


def add(adapters: Any) -> Callable[[Any], Any]:
    return lambda model: xlora.add_xlora_to_model(model, xlora.xLoRAConfig(32), adapters)


def test_no_experts(folders: dict[str, Path]) -> None:
    refused(add(None), XLoRAError, "at least one expert")
    refused(add({}), XLoRAError, "at least one expert")
    refused(add(list(folders)), XLoRAError, "must be {name: folder")
    in_config = xlora.xLoRAConfig(32, adapters=folders)
    assert xlora.add_xlora_to_model(base(), in_config).xlora_experts == NAMES


def test_names(folders: dict[str, Path]) -> None:
    refused(add({"math": folders["math"], "mine": folders["law"]}), XLoRAError, "has a task 'mine'", fresh())
    refused(add({"math": folders["math"], "": folders["law"]}), AdapterError, "non-empty string")


def test_a_folder_that_is_missing_comes_last(folders: dict[str, Path], tmp_path: Path) -> None:
    refused(add({**folders, "gone": tmp_path / "gone"}), AdapterError, "there is no file .*gone")


def test_adapters_of_another_base(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = write_expert(tmp_path / "wide", model=base(hidden=64))
    refused(add({**folders, "wide": wide}), AdapterError, r"lora_A.weight has shape \(2, 64\)")
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=40, n_positions=16))
    write_expert(tmp_path / "gpt2", model=other, targets=("c_attn",))
    refused(add({**folders, "gpt2": tmp_path / "gpt2"}), AdapterError, "belongs to no adaptable layer")


def test_a_model_that_is_no_language_model(folders: dict[str, Path]) -> None:
    body = nn.Module()
    body.model = base().model
    refused(add(folders), XLoRAError, "Module is no causal language model", body)


def test_a_decoder_of_our_own_blocks() -> None:
    model = Transformer(TransformerConfig(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2))
    for name in ("a", "b"):
        inject(model, AdapterConfig(r=2), name)
    mix = lambda model: xlora.mix(model, ("a", "b"), xlora.xLoRAConfig(8))  # noqa: E731
    refused(mix, XLoRAError, "Transformer is no causal language model of transformers", model)


def test_a_mixture_is_no_base(folders: dict[str, Path], written: Path) -> None:
    model = mixture(folders)
    refused(add({"more": folders["math"]}), XLoRAError, "is a mixture of .* already", model)
    refused(
        lambda m: xlora.from_pretrained(written / "ours", m), XLoRAError, "is a mixture of .* already", model
    )


def test_interrupted(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        torch.rand(1)  # a classifier begins to be drawn
        raise KeyboardInterrupt

    monkeypatch.setattr("orbit.xlora.create.mix", interrupt)
    model = fresh()
    before = photograph(model)
    with pytest.raises(KeyboardInterrupt):
        add(folders)(model)
    assert_same(before, photograph(model))


# -- from_pretrained -----------------------------------------------------------------------------------------


def reading(folder: Path, adapters: Any = None, **options: Any) -> Callable[[Any], Any]:
    return lambda model: xlora.from_pretrained(folder, model, adapters, **options)


def edited(
    change: Callable[[dict[str, Any]], None], name: str = "xlora_config.json"
) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        conf = json.loads((folder / name).read_text())
        change(conf)
        (folder / name).write_text(json.dumps(conf))

    return edit


CLASSIFIERS = ("xlora_classifier.safetensors", "adapter_model.safetensors")


def retyped(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (path,) = (folder / name for name in CLASSIFIERS if (folder / name).is_file())
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("ours", lambda f: (f / "xlora_config.json").unlink(), "there is no xlora_config.json"),
    "a config that is cut off": ("ours", cut("xlora_config.json"), "is not JSON"),
    "a config that is a list": (
        "ours",
        lambda f: (f / "xlora_config.json").write_text("[]"),
        "must be an object",
    ),
    "a config of a later version": ("ours", edited(lambda c: c.update(orbit_format=2)), "orbit_format 2"),
    "a setting that nobody knows": ("ours", edited(lambda c: c.update(gate="hard")), "gate='hard'"),
    "a setting out of range": (
        "ours",
        edited(lambda c: c.update(softmax_temperature=0)),
        "softmax_temperature=0",
    ),
    "no hidden size": ("public", edited(lambda c: c.pop("hidden_size")), "hidden_size is missing"),
    "adapters that are no object": ("ours", edited(lambda c: c.update(adapters=[])), "must be objects"),
    "no classifier": ("public", lambda f: (f / "xlora_classifier.safetensors").unlink(), "there is no file"),
    "a classifier that was changed": (
        "ours",
        retyped(lambda t: t.popitem()),
        "is not what .* was saved with",
    ),
    "a classifier that is cut off": ("public", cut("xlora_classifier.safetensors"), "cannot be read"),
    "NaN in the classifier": (
        "public",
        retyped(lambda t: t["last.bias"].fill_(float("nan"))),
        "last.bias holds values that are not finite",
    ),
    "another number of experts": (
        "public",
        retyped(lambda t: t.update({"last.bias": torch.zeros(28)})),
        r"layers.6.bias has shape \(28,\), .* over 3 experts × 14 layers, has \(42,\)",
    ),
    "another width": (
        "public",
        edited(lambda c: c.update(xlora_size=4)),
        r"has shape \(8,\).* has \(4,\)",
    ),
    "a layer too few": ("public", edited(lambda c: c.update(xlora_depth=4)), "is missing"),
    "a layer too many": ("public", edited(lambda c: c.update(xlora_depth=2)), "is unexpected"),
    "scalings of sequences": (
        "public",
        edited(lambda c: c.update(use_mean_pool=False)),
        "gave scalings to sequences",
    ),
    "a choice in the scaling pass": (
        "public",
        edited(lambda c: c.update(scaling_pass_value=0.5, top_k_lora=1)),
        "in the scaling pass too",
    ),
    "another class of model": (
        "ours",
        edited(lambda c: c["base"].update({"class": "MistralForCausalLM"})),
        "over a MistralForCausalLM, and the model is a LlamaForCausalLM",
    ),
    "another size of model": (
        "ours",
        edited(lambda c: c["base"].update(hidden_size=4096)),
        "of hidden size 4096, and the model's is 32",
    ),
    "a missing expert": ("ours", lambda f: shutil.rmtree(f / "adapters" / "art"), "expert 'art' is not in"),
    "an expert that was changed": ("ours", cut("adapters/law/adapter_model.safetensors"), "is not what"),
    "an expert without its config": (
        "public",
        lambda f: (f / "adapters" / "law" / "adapter_config.json").unlink(),
        "there is no adapter_config.json",
    ),
    "PEFT's adapters are no object": (
        "peft",
        edited(lambda c: c.update(adapters=None), "adapter_config.json"),
        "must map names to folders",
    ),
    "PEFT's classifier without a layer": (
        "peft",
        retyped(lambda t: t.pop("base_model.internal_xlora_classifier.layers.3.weight")),
        "layers.3.weight is missing: PEFT leaves",
    ),
    "PEFT's plain LoRA": (
        "peft",
        edited(lambda c: c.update(peft_type="LORA"), "adapter_config.json"),
        "there is no xlora_config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_damaged(damage: str, written: Path, tmp_path: Path) -> None:
    whose, change, message = DAMAGES[damage]
    shutil.copytree(written / whose, tmp_path / "x")
    reading(tmp_path / "x")(base())  # it is the damage that is refused
    change(tmp_path / "x")
    refused(reading(tmp_path / "x"), AdapterError, message)


def test_a_pickle_that_runs_code(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "public", tmp_path / "x")
    torch.save({"last.weight": Bomb(tmp_path / "ran")}, tmp_path / "x" / "xlora_classifier.pt")
    refused(reading(tmp_path / "x", from_safetensors=False), XLoRAError, "cannot be read")
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_experts_that_the_classifier_does_not_know(written: Path, folders: dict[str, Path]) -> None:
    fewer = {name: folders[name] for name in NAMES[:2]}
    for given in (fewer, list(fewer), {**fewer, "poems": folders["art"]}, ["math", "law", "art", "art"]):
        refused(reading(written / "ours", given), XLoRAError, r"mixes the experts \['math', 'law', 'art'\]")
    refused(reading(written / "ours", "math"), XLoRAError, "must be {name: folder}, or a list of names")


def test_experts_on_other_layers(written: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """The same names, shapes that fit, but not the layers that the scalings are for."""
    fewer = {name: write_expert(tmp_path / name, targets=("q_proj",)) for name in NAMES}
    refused(reading(written / "ours", fewer), XLoRAError, "on 14 layers; these lie on 2")
    refused(reading(written / "public", fewer), XLoRAError, r"over 3 experts × 2 layers, has")


def test_a_public_folder_that_names_nobody(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "public", tmp_path / "x")
    edited(lambda conf: conf.pop("adapters"))(tmp_path / "x")
    refused(reading(tmp_path / "x"), XLoRAError, "does not name its experts")


def test_another_model_of_the_same_class(written: Path) -> None:
    refused(
        reading(written / "ours"), XLoRAError, "of hidden size 32, and the model's is 64", base(hidden=64)
    )
    refused(reading(written / "public"), AdapterError, r"has shape \(2, 32\)", base(hidden=64))


def test_no_folder(tmp_path: Path) -> None:
    refused(reading(tmp_path / "none"), XLoRAError, "there is no xlora_config.json in")
    refused(reading(Path("lamm-mit/x-lora")), XLoRAError, "snapshot_download")


def test_after_a_refusal_the_model_can_be_used(written: Path, folders: dict[str, Path]) -> None:
    model = base()
    with pytest.raises(XLoRAError):
        xlora.add_xlora_to_model(model, xlora.xLoRAConfig(32, top_k_lora=9), folders)
    assert torch.equal(logits(xlora.from_pretrained(written / "ours", model)), logits(mixture(folders)))

"""Mixtures on disk: complete, whole or not at all, and in PEFT's and the public implementation's formats too."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import orbit.xlora as xlora
from orbit.adapter import AdapterConfig, adapter_parameters, inject, load, tasks
from orbit.xlora import XLoRAError
from tests.tiny_llm import tiny_tokenizer
from tests.xlora.folders import TOKENS, assert_same, base, experts, logits, mixture, photograph, write_expert

NAMES = ("math", "law", "art", "code")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return experts(tmp_path_factory.mktemp("experts"), *NAMES)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# -- our own folder ------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "one linear": {"xlora_depth": 1, "layerwise_scalings": False},
    "deep, layerwise": {},
    "top-k": {"top_k_lora": 2, "enable_softmax_topk": True},
    "no softmax, temperature, weight, scaling pass": {
        "enable_softmax": False,
        "softmax_temperature": 0.5,
        "global_scaling_weight": 1.5,
        "scaling_pass_value": 0.3,
    },
    "bare": {"use_bias": False, "enable_relu_and_dropout": False, "xlora_dropout_p": 0.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders, **KINDS[kind])
    saved.save_pretrained(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", base())
    assert torch.equal(logits(loaded), logits(saved))
    assert torch.equal(loaded.get_latest_scalings(), saved.get_latest_scalings())
    assert loaded.xlora_config.as_plain() == saved.xlora_config.as_plain()
    assert loaded.xlora_experts == NAMES
    assert loaded.get_nb_trainable_parameters() == saved.get_nb_trainable_parameters()
    assert files_in(tmp_path / "x") == {
        "xlora_config.json",
        "xlora_classifier.safetensors",
        "model.safetensors",
        *(f"adapters/{name}/adapter_config.json" for name in NAMES),
        *(f"adapters/{name}/adapter_model.safetensors" for name in NAMES),
    }


def test_experts_of_every_make(tmp_path: Path) -> None:
    makes: dict[str, dict[str, Any]] = {
        "plain": {"r": 4},
        "few layers": {"targets": ("q_proj", "down_proj")},
        "dora": {"dora": True},
        "rslora": {"rslora": True, "dropout": 0.1},
        "gated": {"gated": True},
        "pissa": {"init": "pissa"},
        "embedding": {"targets": ("embed_tokens", "v_proj")},
        "head": {"targets": ("q_proj",), "save_modules": ("lm_head",)},
        "norm": {"targets": ("q_proj",), "save_modules": ("input_layernorm",)},
        "biases": {"bias": "all"},
        "token rows": {"targets": ("v_proj",), "tokens": {"embed_tokens": (3, 7)}},
    }
    made = {name: write_expert(tmp_path / name, seed, **makes[name]) for seed, name in enumerate(makes)}
    saved = mixture(made)
    saved.save_pretrained(tmp_path / "x")
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", base())), logits(saved))


def test_experts_of_a_tied_embedding(tmp_path: Path) -> None:
    """Token rows of a tied weight are the embedding's and the head's, one tensor under two names."""
    config = LlamaConfig(
        vocab_size=28,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )

    def tied() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    options = {"targets": ("v_proj",), "tokens": {"embed_tokens": (3, 7)}}
    made = {f"e{k}": write_expert(tmp_path / f"e{k}", k, tied(), **options) for k in range(2)}
    saved = mixture(made, tied())
    apart = {key: tensor.clone() for key, tensor in saved.state_dict().items()}
    for state in (None, apart):
        saved.save_pretrained(tmp_path / "x", state_dict=state)
        loaded = xlora.from_pretrained(tmp_path / "x", tied())
        assert torch.equal(logits(loaded), logits(saved))


def test_names_are_free(folders: dict[str, Path], tmp_path: Path) -> None:
    names = ("..", "a/b", "train", "Train", "é" * 50, "expert%1", " ")
    saved = mixture(dict.fromkeys(names, folders["math"]))
    saved.save_pretrained(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", base())
    assert loaded.xlora_experts == names
    assert torch.equal(logits(loaded), logits(saved))
    below = [path.name for path in (tmp_path / "x" / "adapters").iterdir()]
    assert len({name.casefold() for name in below}) == len(names), "also where case is not told apart"
    assert files_in(tmp_path) == {f"x/{name}" for name in files_in(tmp_path / "x")}, (
        "nothing is written elsewhere"
    )


def test_nothing_of_this_machine_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture(folders, device="cpu").save_pretrained(tmp_path / "x")
    text = (tmp_path / "x" / "xlora_config.json").read_text()
    assert str(tmp_path.parent) not in text
    assert "device" not in json.loads(text)
    shutil.move(tmp_path / "x", tmp_path / "moved")
    assert xlora.from_pretrained(tmp_path / "moved", base()).xlora_experts == NAMES


def test_precisions(folders: dict[str, Path], tmp_path: Path) -> None:
    """A bfloat16 base with a float32 classifier, as is the rule, and all of it in bfloat16."""
    ruled, cast = mixture(folders, base(dtype=torch.bfloat16)), mixture(folders).bfloat16()
    for k, saved in enumerate((ruled, cast)):
        saved.save_pretrained(tmp_path / str(k))
        loaded = xlora.from_pretrained(tmp_path / str(k), base(dtype=torch.bfloat16))
        assert torch.equal(logits(loaded), logits(saved))
        assert loaded.get_latest_scalings().dtype == saved.get_latest_scalings().dtype


def test_trained_experts_and_what_trains(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders, use_trainable_adapters=True).train()
    with torch.no_grad():
        for parameter in adapter_parameters(saved).values():
            parameter.mul_(1.5)
    saved.save_pretrained(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", base(), list(NAMES))
    assert torch.equal(logits(loaded.eval()), logits(saved.eval()))
    trains = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, parameter in saved.named_parameters() if parameter.requires_grad}
    assert any(".lora_A." in name for name in trains)
    saved.set_use_trainable_adapters(False)
    saved.save_pretrained(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", base())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(loaded).values())


def test_training_mode_and_random_numbers_are_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture(folders).save_pretrained(tmp_path / "x")
    for training in (True, False):
        model = base().train(training)
        drawn = torch.get_rng_state()
        loaded = xlora.from_pretrained(tmp_path / "x", model)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert {module.training for module in loaded.modules()} == {training}


def test_a_task_that_the_model_has_stays_beside_the_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders)
    saved.save_pretrained(tmp_path / "x")
    model = base()
    inject(model, AdapterConfig(r=2, init="gaussian"), "mine")
    loaded = xlora.from_pretrained(tmp_path / "x", model)
    assert tasks(loaded) == ("mine", *NAMES)
    assert torch.equal(logits(loaded), logits(saved))


def test_saving_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    model = mixture(folders)
    model(TOKENS)
    before = photograph(model)
    model.save_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "sd", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "p", peft=True)
    assert_same(before, photograph(model))


def test_a_save_that_fails_leaves_the_old_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = mixture(folders)
    saved.save_pretrained(tmp_path / "x")
    want = logits(saved)
    written = files_in(tmp_path)
    with torch.no_grad():
        for parameter in saved.xlora_classifier.parameters():
            parameter.zero_()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("orbit.xlora.files.saving.to_bytes", full)  # the experts are written by then
        with pytest.raises(OSError, match="no space"):
            saved.save_pretrained(tmp_path / "x")
        with pytest.raises(OSError, match="no space"):
            saved.save_pretrained(tmp_path / "new")
    assert files_in(tmp_path) == written
    assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", base())), want)


def test_a_save_that_is_cut_off_between_two_files_is_noticed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = mixture(folders)
    saved.save_pretrained(tmp_path / "x")
    with torch.no_grad():
        for parameter in saved.xlora_classifier.parameters():
            parameter.mul_(2)
    replace = os.replace

    def killed(source: Any, target: Any) -> None:
        if str(target).endswith("xlora_config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        saved.save_pretrained(tmp_path / "x")
    with pytest.raises(XLoRAError, match=r"xlora_classifier.safetensors is missing or is not what"):
        xlora.from_pretrained(tmp_path / "x", base())


def test_a_folder_never_holds_an_older_mixture_in_the_other_format(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """`from_pretrained` and PEFT each read their own config, and would find what was saved before."""
    saved = mixture(folders)
    for for_peft in (False, True):
        saved.save_pretrained(tmp_path / "x", peft=for_peft)
        written = files_in(tmp_path / "x")
        with pytest.raises(XLoRAError, match=r"_config.json is there.*choose another folder"):
            saved.save_pretrained(tmp_path / "x", peft=not for_peft)
        assert files_in(tmp_path / "x") == written
        shutil.rmtree(tmp_path / "x")


def test_what_is_resumed_from_is_what_was_saved_last(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders)
    saved.save_pretrained(tmp_path / "x")
    with torch.no_grad():
        saved.xlora_classifier.layers[0].weight.zero_()
    saved.save_pretrained(tmp_path / "x", safe_serialization=False)
    resumed = load_file(tmp_path / "x" / "model.safetensors")
    assert not resumed["xlora_classifier.layers.0.weight"].any()


def test_a_state_dict_is_what_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    """As Trainer gives it: full tensors of a model that is sharded, perhaps under a wrapper's names."""
    saved = mixture(folders)
    want = logits(saved)
    for prefix in ("", "module.", "_orig_mod."):
        state = {f"{prefix}{key}": tensor.clone() for key, tensor in saved.state_dict().items()}
        other = mixture(folders)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        other.save_pretrained(tmp_path / "x", state_dict=state)
        assert torch.equal(logits(xlora.from_pretrained(tmp_path / "x", base())), want)
    del state["_orig_mod.xlora_classifier.layers.0.weight"]
    with pytest.raises(XLoRAError, match=r"state_dict lacks xlora_classifier.layers.0.weight"):
        other.save_pretrained(tmp_path / "y", state_dict=state)
    assert not (tmp_path / "y").exists()


def test_only_the_process_that_is_told_to_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    mixture(folders).save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_arguments_that_a_mixture_cannot_honour(folders: dict[str, Path], tmp_path: Path) -> None:
    model = mixture(folders)
    with pytest.raises(XLoRAError, match=r"save_pretrained\(variant='fp16'\)"):
        model.save_pretrained(tmp_path / "x", variant="fp16")
    with pytest.raises(XLoRAError, match="safe_serialization"):
        model.save_pretrained(tmp_path / "x", peft=True, safe_serialization=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(tmp_path / "x", max_shard_size="5GB")  # as push_to_hub does


def test_transformers_trainer_saves_it(folders: dict[str, Path], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved = mixture(folders)
    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in TOKENS]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        learning_rate=0.1,
        disable_tqdm=True,
    )
    before = {key: value.clone() for key, value in saved.xlora_classifier.state_dict().items()}
    trainer = transformers.Trainer(
        model=saved, args=arguments, train_dataset=rows, processing_class=tiny_tokenizer()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own
        trainer.train()
        trainer.save_model(str(tmp_path / "end"))
    assert any(not torch.equal(v, before[k]) for k, v in saved.xlora_classifier.state_dict().items())
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "end"):
        assert torch.equal(logits(xlora.from_pretrained(folder, base())), logits(saved.eval()))


# -- the ways to ask for it ----------------------------------------------------------------------------------


@pytest.fixture
def on_disk(folders: dict[str, Path], tmp_path: Path) -> Path:
    mixture(folders).save_pretrained(tmp_path / "x")
    return tmp_path / "x"


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]])
@pytest.mark.parametrize("kind", ["folders", "names"])
def test_the_order_of_the_experts_is_the_files(
    kind: str, order: tuple[str, ...], on_disk: Path, folders: dict[str, Path]
) -> None:
    given = list(order) if kind == "names" else {name: folders[name] for name in order}
    loaded = xlora.from_pretrained(str(on_disk), base(), given)
    assert loaded.xlora_experts == NAMES
    assert torch.equal(logits(loaded), logits(mixture(folders)))


CALLS: dict[str, tuple[Any, ...]] = {
    "the API list": (False, "cpu"),
    "the examples": ("cpu",),
    "the examples, and verbose": ("cpu", False),
    "a torch.device": (torch.device("cpu"),),
    "neither": (),
}


@pytest.mark.parametrize("call", CALLS)
def test_both_orders_of_arguments(call: str, on_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = xlora.from_pretrained(on_disk, base(), list(NAMES), *CALLS[call])
    assert next(loaded.xlora_classifier.parameters()).device.type == "cpu"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("arguments", [(False, "cuda:99"), ("cuda:99",), ("cuda:99", False)])
def test_the_device_is_asked_for_in_both_orders(arguments: tuple[Any, ...], on_disk: Path) -> None:
    with pytest.raises(XLoRAError, match=r"device='cuda:99'"):
        xlora.from_pretrained(on_disk, base(), list(NAMES), *arguments)


@pytest.mark.parametrize("arguments", [(True, "cpu"), ("cpu", True), (True,)])
def test_verbose_in_both_orders(
    arguments: tuple[Any, ...], on_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    xlora.from_pretrained(on_disk, base(), None, *arguments)
    said = capsys.readouterr().out
    assert "4 experts on 14 layers" in said
    assert "trainable params" in said


@pytest.mark.parametrize("arguments", [("cpu", "cpu"), (True, False)])
def test_two_devices_or_none_are_refused(arguments: tuple[Any, ...], on_disk: Path) -> None:
    with pytest.raises(XLoRAError, match="give True or False"):
        xlora.from_pretrained(on_disk, base(), None, *arguments)


def test_a_pickled_classifier(folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders)
    saved.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert "xlora_classifier.pt" in files_in(tmp_path / "x")
    loaded = xlora.from_pretrained(tmp_path / "x", base(), from_safetensors=False)
    assert torch.equal(logits(loaded), logits(saved))
    with pytest.raises(XLoRAError, match="from_safetensors=False"):
        xlora.from_pretrained(tmp_path / "x", base())


def test_another_expert_than_was_saved_is_said(
    on_disk: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = folders | {"law": write_expert(tmp_path / "law", seed=9)}
    with pytest.warns(UserWarning, match="expert 'law' of .* is not the one"):
        loaded = xlora.from_pretrained(on_disk, base(), other)
    assert not torch.equal(logits(loaded), logits(mixture(folders)))


# -- PEFT ----------------------------------------------------------------------------------------------------


def peft_model(folder: Path) -> Any:
    model = base()
    model.config.use_cache = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|`enable_softmax_topk`")  # of their own
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"xlora_depth": 1},
        {"xlora_depth": 4, "layerwise_scalings": False, "xlora_dropout_p": 0.0},
        {
            "global_scaling_weight": 1.5,
            "scaling_pass_value": 0.3,
            "softmax_temperature": 2.0,
        },
        {"top_k_lora": 2, "enable_softmax_topk": True},
    ],
    ids=["deep", "one linear", "no dropout", "scaling pass", "top-k"],
)
def test_peft_loads_the_export(config: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    saved = mixture(folders, **config)
    saved.save_pretrained(tmp_path / "x", peft=True)
    theirs = peft_model(tmp_path / "x")
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=TOKENS).logits, logits(saved), rtol=1e-5, atol=1e-5)
    back = xlora.from_pretrained(tmp_path / "x", base())
    assert back.xlora_experts == ("0", "1", "2", "3")
    assert torch.equal(logits(back), logits(saved))


def test_peft_takes_more_experts_than_digits_and_other_layers(tmp_path: Path) -> None:
    made = experts(tmp_path, *(f"e{k}" for k in range(12)))
    made["e3"] = write_expert(tmp_path / "few", 3, targets=("q_proj", "down_proj"))
    made["e4"] = write_expert(tmp_path / "gated", 4, gated=True)  # folded into B
    made["e5"] = write_expert(tmp_path / "pissa", 5, init="pissa")  # as extra ranks
    saved = mixture(made)
    saved.save_pretrained(tmp_path / "x", peft=True)
    with torch.no_grad():
        theirs = peft_model(tmp_path / "x")(input_ids=TOKENS).logits
    torch.testing.assert_close(theirs, logits(saved), rtol=1e-5, atol=1e-5)


NOT_PEFTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": ({"dora": True}, {}, "no DoRA experts, and 'odd' is one"),
    "no bias": ({}, {"use_bias": False}, "use_bias=False"),
    "no ReLU": ({}, {"enable_relu_and_dropout": False}, "enable_relu_and_dropout=False"),
    "a choice in the scaling pass": (
        {},
        {"top_k_lora": 1, "scaling_pass_value": 0.3},
        "top_k_lora and enable_softmax_topk in the scaling pass",
    ),
    "a module": ({"save_modules": ("norm",)}, {}, "'odd' has more"),
    "the head": ({"targets": ("lm_head",)}, {}, "'odd' is on lm_head"),
}


@pytest.mark.parametrize("kind", NOT_PEFTS)
def test_what_peft_cannot_hold_is_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options, config, message = NOT_PEFTS[kind]
    odd = write_expert(tmp_path / "odd", **options)
    model = mixture({"math": folders["math"], "odd": odd}, **config)
    with pytest.raises(XLoRAError, match=message):
        model.save_pretrained(tmp_path / "x", peft=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("depth", [1, 3])
def test_pefts_own_save_is_incomplete_and_says_so(
    depth: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    mixture(folders, xlora_depth=depth).save_pretrained(tmp_path / "x", peft=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model(tmp_path / "x").save_pretrained(tmp_path / "theirs")
    with pytest.raises(XLoRAError, match=r"layers.0.weight is missing: PEFT leaves layers of it out"):
        xlora.from_pretrained(tmp_path / "theirs", base())


# -- the public implementation -------------------------------------------------------------------------------


def as_public(model: Any, folder: Path, *, pickled: bool = False, adapters: Any = "paths") -> None:
    """The folder that the public implementation would write of this mixture."""
    model.save_pretrained(folder)
    conf = json.loads((folder / "xlora_config.json").read_text())
    for key in ("orbit_format", "base", "sha256", "adapters"):
        del conf[key]
    if adapters is not None:
        names = {name: f"/elsewhere/{name}" for name in model.xlora_experts}
        conf["adapters"] = names if adapters == "paths" else list(names)
    conf |= {"base_model_id": "mistralai/Mistral-7B-v0.1", "stop_token_id": None}
    (folder / "xlora_config.json").write_text(json.dumps(conf))
    tensors = load_file(folder / "xlora_classifier.safetensors")
    (folder / "xlora_classifier.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    order = sorted({int(key.split(".")[1]) for key in tensors})
    names = {f"layers.{k}": "last" if k == order[-1] else f"inner.{k}" for k in order}
    theirs = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in tensors.items()}
    if pickled:
        torch.save(theirs, folder / "xlora_classifier.pt")
    else:
        save_file(theirs, folder / "xlora_classifier.safetensors")


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pt"])
def test_the_public_implementations_folder(
    pickled: bool, depth: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved = mixture(folders, xlora_depth=depth)
    as_public(saved, tmp_path / "x", pickled=pickled)
    for given in (dict(reversed(folders.items())), list(NAMES), None):
        loaded = xlora.from_pretrained(
            tmp_path / "x", base(), given, False, "cpu", from_safetensors=not pickled
        )
        assert torch.equal(logits(loaded), logits(saved))


@pytest.mark.parametrize("adapters", ["names", None])
def test_public_folders_that_name_their_experts_otherwise(
    adapters: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved = mixture(folders)
    as_public(saved, tmp_path / "x", adapters=adapters)
    loaded = xlora.from_pretrained(tmp_path / "x", base(), list(NAMES))
    assert torch.equal(logits(loaded), logits(saved))
    for name in NAMES:  # of the public code's last version
        shutil.move(tmp_path / "x" / "adapters" / name, tmp_path / "x" / name)
    loaded = xlora.from_pretrained(tmp_path / "x", base(), list(NAMES))
    assert torch.equal(logits(loaded), logits(saved))


# -- load_model ----------------------------------------------------------------------------------------------


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    base().save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer(pad=None)
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_load_model(base_folder: Path, on_disk: Path, folders: dict[str, Path], capsys: Any) -> None:
    model, tokenizer = xlora.xlora_utils.load_model(
        str(base_folder), str(on_disk), "cpu", torch.float32, list(NAMES)
    )
    assert torch.equal(logits(model), logits(mixture(folders)))
    assert not model.training
    assert model.config.use_cache is False
    assert tokenizer.pad_token == tokenizer.eos_token
    assert capsys.readouterr().out == ""


def test_load_model_without_the_folder_of_a_mixture_loads_nothing() -> None:
    with pytest.raises(XLoRAError, match="needs fine_tune_model_name"):
        xlora.xlora_utils.load_model("no such model", None, "cpu", torch.float32)


def test_every_argument_of_load_model_does_something(
    base_folder: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    asked = {}
    plain = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        options.pop("attn_implementation", None)  # there is no FlashAttention here
        return plain(name, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model = xlora.xlora_utils.load_model
    model, _ = load_model(
        base_folder, None, "cpu", torch.bfloat16, load_xlora=False, verbose=True, use_cache=True
    )
    assert not isinstance(model, xlora.xLoRAModel)
    assert (model.dtype, model.config.use_cache) == (torch.bfloat16, True)
    assert "the base model alone" in capsys.readouterr().out
    assert "attn_implementation" not in asked
    model, _ = load_model(
        base_folder, on_disk, "cpu", torch.float32, None, use_flash_attention_2=True, verbose=True
    )
    assert asked["attn_implementation"] == "flash_attention_2"
    assert "4 experts on 14 layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="fine_tune_model_name"):
        load_model(base_folder, None, "cpu", torch.float32)
    model, _ = load_model(base_folder, None, "meta", torch.float32, load_xlora=False)
    assert model.device.type == "meta"


def test_an_expert_of_the_folder_is_an_adapter_like_any_other(
    on_disk: Path, folders: dict[str, Path]
) -> None:
    one, other = base(), base()
    load(one, on_disk / "adapters" / "law", "law")
    load(other, folders["law"], "law")
    assert torch.equal(logits(one), logits(other))
    assert isinstance(one, nn.Module)
    assert not isinstance(one, xlora.xLoRAModel)

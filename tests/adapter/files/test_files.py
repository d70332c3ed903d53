"""Adapters on disk: PEFT's format both ways, strictness, atomic writing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    AdapterError,
    AdapterFileError,
    ConfigError,
    GraftError,
    LoRADiagnoser,
    MergeError,
    combine,
    inject,
    load,
    merge,
    save,
    set_route,
    task_config,
    task_layers,
    tasks,
    unmerge,
)
from orbit.adapter.files import CONFIG, WEIGHTS
from orbit.adapter.files.peft_config import from_peft, to_peft

# peft asks transformers a question that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Make = Callable[..., nn.Module]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.*q_proj": 2, "v_proj": 6},
        "alpha_pattern": {"layers.1.mlp.*": 3},
        "dora": True,
    },
}
ATTENTION = ("q_proj", "v_proj", "mlp")


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_we_save(
    kind: str, llama: Make, fill: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    model = llama()
    inject(model, AdapterConfig(r=4, alpha=8, targets=ATTENTION, **KINDS[kind]), "facts")
    fill(model)
    save(model, tmp_path / "a", "facts")
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, WEIGHTS]
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "a")
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    mine = logits(model, tokens)
    assert not torch.allclose(mine, logits(llama(), tokens), atol=1e-2)
    torch.testing.assert_close(logits(theirs, tokens), mine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_peft_saves(
    kind: str, llama: Make, fill: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    config = dict(KINDS[kind])
    theirs = peft.get_peft_model(
        llama(),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
            use_dora=config.pop("dora", False),
            use_rslora=config.pop("rslora", False),
            **config,
        ),
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path / "a")
    model = llama()
    report = load(model, tmp_path / "a")
    assert report is not None
    assert len(report.layers) == 8
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)
    assert report.trainable == 0
    again = llama()
    load(again, save(model, tmp_path / "b"))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    "targets", [".*layers.*(q|v)_proj", "all-linear", ["model.layers.0.self_attn.q_proj", "up_proj"]]
)
def test_pefts_ways_to_write_targets(targets: Any, llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    theirs.eval().save_pretrained(tmp_path)
    model = llama()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


def test_layers_to_transform(llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config)
    theirs.eval().save_pretrained(tmp_path)
    model = llama()
    assert load(model, tmp_path).layers == ("model.layers.1.self_attn.q_proj",)
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapted_head(llama: Make, fill: Callable[..., None], tokens: Tensor, tmp_path: Path) -> None:
    """PEFT saves the weight of an adapted head beside its adapter; it is the model's own, or refused."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    assert any("lm_head.base_layer" in key for key in load_file(tmp_path / "a" / WEIGHTS))
    ours = llama()
    load(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours, tokens), logits(theirs, tokens), atol=1e-5, rtol=0)
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterFileError, match="lm_head.base_layer.weight is unexpected"):
        load(other, tmp_path / "a")


def test_a_model_that_is_one_layer(fill: Callable[..., None], tmp_path: Path) -> None:
    model, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    inject(model, AdapterConfig(r=2))
    fill(model)
    load(other, save(model, tmp_path / "a"))
    x = torch.randn(2, 4)
    assert torch.equal(other(x), model(x))


def test_targets_are_written_so_that_peft_finds_the_same_layers(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {"fc": nn.Linear(2, 2), "deep": nn.ModuleDict({"fc": nn.Linear(2, 2)}), "out": nn.Linear(2, 2)}
    )
    written = {}
    for targets in [("re:.*fc",), ("re:fc",), ("deep.fc",)]:
        inject(model, AdapterConfig(r=1, targets=targets), "-".join(targets))
        save(model, tmp_path / "x", "-".join(targets))
        written[targets] = json.loads((tmp_path / "x" / CONFIG).read_text())["target_modules"]
    assert written == {("re:.*fc",): ["fc"], ("re:fc",): "fc", ("deep.fc",): ["deep.fc"]}


@pytest.fixture
def saved(llama: Make, fill: Callable[..., None], tmp_path: Path) -> Path:
    model = llama()
    inject(model, AdapterConfig(r=4, targets=("q_proj", "v_proj"), dora=True))
    fill(model)
    return save(model, tmp_path / "saved")


def refuses(llama: Make, path: Path, said: str, kind: type[AdapterError] = AdapterFileError) -> None:
    """Loading says what is wrong and changes nothing."""
    model = llama()
    with pytest.raises(kind, match=said):
        load(model, path)
    assert tasks(model) == ()
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), f"{Q}.lora_A.weight is missing"),
        (lambda t: t.pop(f"{Q}.lora_magnitude_vector"), f"{Q}.lora_magnitude_vector is missing"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith(Q)],
            f"{Q}.lora_A.weight is missing; target_modules",
        ),
        (lambda t: t.update({f"{Q}.weight": torch.ones(1)}), f"{Q}.weight is unexpected"),
        (lambda t: t.update({"lora_A.weight": torch.ones(1)}), "lora_A.weight is unexpected"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(70, 32)}),
            "embed_tokens.weight is unexpected: no tensor of an adapter",
        ),
        (lambda t: t.update({f"{Q}.base_layer.bias": torch.ones(32)}), "base_layer.bias is unexpected"),
        (
            lambda t: t.update({f"{Q}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}),
            "trainable_token_indices has no list of indices for 'model.layers.0.self_attn.q_proj'",
        ),
        (
            lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(32, 32)}),
            "base_layer.weight is unexpected",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.full((4, 32), 1e300, dtype=torch.float64)}),
            f"{Q}.lora_A.weight holds values that are not finite",
        ),
        (lambda t: t.update({f"{Q}.lora_embedding_A": torch.ones(1)}), "lora_embedding_A is unexpected"),
        (
            lambda t: t.update({Q.replace("q_proj", "q_porj") + ".lora_A.weight": torch.ones(1)}),
            "belongs to no adaptable layer of LlamaForCausalLM; the nearest layer is 'model.*q_proj'",
        ),
        (
            lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")),
            f"{Q}.lora_A.weight holds values that are not finite",
        ),
        (
            lambda t: t[f"{Q}.lora_B.weight"][0].fill_(float("inf")),
            "lora_B.weight holds values that are not finite",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(5, 32)}),
            r"has shape \(5, 32\), and the layer with this config has \(4, 32\)",
        ),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(32, 4, 1)}), r"has shape \(32, 4, 1\)"),
        (lambda t: t.clear(), "holds no tensors"),
        (
            lambda t: t.update(
                {k.replace("q_proj", "k_proj"): v.clone() for k, v in t.items() if k.startswith(Q)}
            ),
            "k_proj.lora_A.weight is unexpected; target_modules",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], Any], said: str, llama: Make, saved: Path
) -> None:
    edit(saved, change)
    refuses(llama, saved, said)


@pytest.mark.parametrize(
    ("fields", "said", "kind"),
    [
        ({"r": 10**8}, "no update of it has a rank above 32, and r is 100000000", ConfigError),
        ({"r": 33}, "no update of it has a rank above 32, and r is 33", ConfigError),
        ({"lora_alpha": float("nan")}, "alpha must be a finite number", ConfigError),
        ({"rank_pattern": {r"([\w.]|[\w.])*\W\W": 2}}, "takes over 1 s", ConfigError),
        ({"r": -1}, "r must be a whole number", ConfigError),
        ({"r": "4"}, "r must be a whole number", ConfigError),
        ({"lora_alpha": None}, "alpha must be a finite number", ConfigError),
        (
            {"use_dora": False},
            "lora_magnitude_vector is unexpected: a task with this config",
            AdapterFileError,
        ),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'", ConfigError),
        ({"bias": "some"}, "bias must be one of 'none', 'lora_only', 'all', got 'some'", ConfigError),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight is missing", AdapterFileError),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights='pissa_niter_4' changed the base",
            ConfigError,
        ),
        (
            {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
            "names a class",
            AdapterFileError,
        ),
        ({"peft_type": "ORBIT"}, "malformed", ConfigError),
        (
            {"peft_type": "ORBIT", "orbit": {"gated": False, "init": "kaiming", "warp": 9}},
            "'warp': …} cannot be honoured here",
            ConfigError,
        ),
        ({"lora_bias": True}, "lora_bias=True cannot be honoured", ConfigError),
        ({"from_the_future": 1}, "from_the_future=1 cannot be honoured", ConfigError),
        ({"rank_pattern": [1]}, "malformed", ConfigError),
        ({"target_modules": "("}, r"'\(' is not a regular expression", ConfigError),
        ({"exclude_modules": "("}, r"'\(' is not a regular expression", ConfigError),
        ({"target_modules": ["q_proj"]}, "v_proj.lora_A.weight is unexpected", AdapterFileError),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    fields: dict[str, Any], said: str, kind: type[AdapterError], llama: Make, saved: Path
) -> None:
    config = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps({**config, **fields}))
    refuses(llama, saved, said, kind)


def test_files_that_cannot_be_read_are_refused(llama: Make, saved: Path, tmp_path: Path) -> None:
    refuses(llama, tmp_path / "nowhere", "there is no file .*nowhere")
    refuses(llama, Path("someone/adapter"), "there is no file .*adapter_model.safetensors; a name on the Hub")
    weights = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    refuses(llama, saved, "cannot be read")
    (saved / WEIGHTS).write_bytes(weights)
    (saved / CONFIG).write_text("{")
    refuses(llama, saved, "not JSON")
    (saved / CONFIG).write_text("[]")
    refuses(llama, saved, "must be an object")
    (saved / CONFIG).unlink()
    refuses(llama, saved, "there is no adapter_config.json")
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(b"")
    refuses(llama, saved, "is a pickle")


def test_loading_into_a_task_that_is_there(
    llama: Make, fill: Callable[..., None], tokens: Tensor, saved: Path, tmp_path: Path
) -> None:
    model, other = llama(), llama()
    load(other, saved)
    inject(model, task_config(other, "default"), "mine")
    assert load(model, saved, "mine") is None
    assert torch.equal(logits(model, tokens), logits(other, tokens))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    load(model, saved, "another", trainable=True)
    assert tasks(model) == ("mine", "another")
    for config, said in [
        (AdapterConfig(r=4, targets=("q_proj", "v_proj")), "dora is True, but False in task 'x'"),
        (AdapterConfig(r=8, targets=("q_proj", "v_proj"), dora=True), "rank of .* is 4, but 8"),
        (AdapterConfig(r=4, alpha=1, targets=("q_proj", "v_proj"), dora=True), "alpha of .* is 32.0, but 1"),
        (AdapterConfig(r=4, targets=("q_proj",), dora=True), "v_proj.lora_A.weight is unexpected"),
        (AdapterConfig(r=4, targets=("self_attn",), dora=True), "k_proj.lora_A.weight is missing"),
    ]:
        fresh = llama()
        inject(fresh, config, "x")
        before = {name: p.clone() for name, p in fresh.named_parameters()}
        with pytest.raises(AdapterFileError, match=said):
            load(fresh, saved, "x")
        assert all(torch.equal(p, before[name]) for name, p in fresh.named_parameters())


def test_one_file(llama: Make, tokens: Tensor, saved: Path, tmp_path: Path) -> None:
    model, other = llama(), llama()
    load(model, saved)
    path = save(model, tmp_path / "deep" / "one.safetensors")
    assert os.listdir(tmp_path / "deep") == ["one.safetensors"]
    load(other, path)
    assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_writing_is_all_or_nothing(
    llama: Make, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    inject(model, AdapterConfig(r=2, targets=("q_proj",)))
    (saved / "README.md").write_text("mine")
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    real = os.fsync
    left = [1]

    def full(handle: int) -> None:
        if not left.pop():
            raise OSError(28, "no space left")
        left.append(0)
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(model, saved)
    left[:] = [1]
    with pytest.raises(OSError, match="no space"):
        save(model, tmp_path / "new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    save(model, saved)
    assert sorted(p.name for p in saved.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    umask = os.umask(0)
    os.umask(umask)
    assert (save(model, tmp_path / "new").stat().st_mode & 0o777) == 0o777 & ~umask


def test_wrapped_models_save_plain_names(llama: Make, tokens: Tensor, saved: Path, tmp_path: Path) -> None:
    model, other = llama(), llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    load(model, saved)
    assert load_file(save(model, tmp_path / "x") / WEIGHTS).keys() == load_file(saved / WEIGHTS).keys()
    load(other, tmp_path / "x")
    for path, layer in task_layers(other, "default").items():
        own = task_layers(model, "default")[path.replace("layers.0.", "layers.0._orig_mod.")]
        assert torch.equal(layer.slots()["default"].up.weight, own.slots()["default"].up.weight)


def test_config_round_trip_with_peft() -> None:
    for config in [
        AdapterConfig(r=3, alpha=5, dropout=0.1, dora=True, targets=("k", "q")),
        AdapterConfig(r=3, rslora=True, targets=("q",), rank_pattern={"q": 4}, alpha_pattern={"k": 2.0}),
    ]:
        fields = to_peft(config, list(config.targets))
        theirs = peft.LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"})
        assert from_peft(theirs.to_dict(), config.targets) == config
        assert theirs.r == config.r
    own = AdapterConfig(gated=True, init="olora", targets=("q",))
    assert from_peft(to_peft(own, ["q"], own=True), ["q"]) == own


@pytest.mark.parametrize(
    "settings", [{"gated": True}, {"init": "pissa"}, {"init": "olora", "gated": True, "dora": True}]
)
def test_what_peft_has_no_place_for_is_kept_exactly_or_folded(
    settings: dict[str, Any], llama: Make, fill: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    model, other, folded = llama(), llama(), llama()
    inject(model, AdapterConfig(r=4, targets=("q_proj", "up_proj"), **settings))
    fill(model)
    mine = logits(model, tokens)
    load(other, save(model, tmp_path / "exact"))
    assert torch.equal(logits(other, tokens), mine)
    assert other.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(Exception, match="ORBIT"):
        peft.PeftModel.from_pretrained(llama(), tmp_path / "exact")
    path = save(model, tmp_path / "folded", peft=True)
    load(folded, path)
    torch.testing.assert_close(logits(folded, tokens), mine, rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(llama(), path)
    torch.testing.assert_close(logits(theirs, tokens), mine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_file_of_peft_that_means_its_own_start(
    init: str, llama: Make, tokens: Tensor, tmp_path: Path
) -> None:
    """PEFT writes A and B alone, and repeats the init on the base when it loads them; so do we."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path)
    model = llama()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


def test_a_deeply_nested_config_is_refused(llama: Make, saved: Path) -> None:
    for text in ("[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, (saved / CONFIG).read_text()[:-20]):
        (saved / CONFIG).write_text(text)
        refuses(llama, saved, "nested too deeply|not JSON")


def test_a_classifiers_file(tmp_path: Path) -> None:
    """PEFT lists "classifier" and "score" for every classifier; the model has one of them."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        return LlamaForSequenceClassification(
            LlamaConfig(vocab_size=64, num_hidden_layers=1, pad_token_id=0, **sizes)
        ).eval()

    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        theirs.base_model.model.score.modules_to_save["default"].weight.add_(0.1)
    theirs.save_pretrained(tmp_path)
    model, tokens = make(), torch.randint(1, 64, (3, 5))
    assert load(model, tmp_path).layers == ("model.layers.0.self_attn.q_proj", "score")
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("there", "written"), [("kaiming", "pissa"), ("pissa", True), ("pissa", "olora"), ("olora", "gaussian")]
)
def test_a_start_is_not_mixed_with_factors_that_were_not_counted_from_it(
    there: str, written: Any, llama: Make, tmp_path: Path
) -> None:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(init_lora_weights=written, **settings))
    theirs.save_pretrained(tmp_path)
    model = llama()
    inject(model, AdapterConfig(r=4, alpha=8, targets=("q_proj",), init=there))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(AdapterFileError, match="the start .* load under another name"):
        load(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    load(model, tmp_path, "another")


def test_a_task_that_only_runs_does_not_stop_a_head_from_training(
    llama: Make, saved: Path, tmp_path: Path
) -> None:
    model = llama()
    inject(model, AdapterConfig(r=2, targets=("q_proj",)), "mine")
    model.lm_head.weight.requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    load(model, saved, "reference")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    load(model, saved, "more", trainable=True)
    assert not model.lm_head.weight.requires_grad


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_embeddings_that_were_saved_beside_the_adapter(llama: Make, tokens: Tensor, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    model = llama()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model, tokens), logits(theirs, tokens), atol=1e-5, rtol=0)
    with torch.no_grad():
        (other := llama()).lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterFileError, match="lm_head.weight is unexpected"):
        load(other, tmp_path)


def test_a_new_task_is_refused_where_inject_refuses_it(mlp: Make, tmp_path: Path) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2))
    save(model, tmp_path / "a")
    with _one_process(tmp_path):
        parallel = nn.parallel.DistributedDataParallel(model)
        load(parallel, tmp_path / "a")
        with pytest.raises(GraftError, match="DistributedDataParallel"):
            load(parallel, tmp_path / "a", "new", trainable=True)
    assert tasks(model) == ("default",)


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_names_are_those_without_wrappers(
    llama: Make, fill: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    model = llama()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    targets = ("layers.0.self_attn.q_proj", "layers.*.mlp.up_proj", "re:model.layers.0.mlp.gate_proj")
    inject(model, AdapterConfig(r=4, targets=targets, rank_pattern={"layers.0.self_attn.q_proj": 2}), "a")
    inject(model, AdapterConfig(r=3, targets=("q_proj",)), "b")
    assert [layer.settings("a").r for layer in task_layers(model, "a").values()] == [2, 4, 4, 4]
    fill(model)
    combine(model, {"a": 1.0, "b": -1.0}, "both")
    for task in ("a", "both"):
        set_route(model, task)
        fresh = llama()
        load(fresh, save(model, tmp_path / task, task))
        torch.testing.assert_close(logits(fresh, tokens), logits(model, tokens), rtol=0, atol=1e-5)
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / task)
        torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), rtol=0, atol=1e-5)


def test_many_write_one_folder(mlp: Make, tmp_path: Path) -> None:
    """As the ranks of a run do, if each of them saves."""
    model = mlp()
    inject(model, AdapterConfig(r=2))
    with ThreadPoolExecutor(8) as pool:
        for turn in range(8):
            paths = [tmp_path / str(turn)] * 8
            assert list(pool.map(lambda path: save(model, path), paths)) == paths
            assert sorted(os.listdir(paths[0])) == [CONFIG, WEIGHTS]


def test_a_rank_that_is_larger_than_a_small_layer(mlp: Make, tmp_path: Path) -> None:
    """PEFT gives every layer of target_modules="all-linear" the same, as the gate of a shared expert, 32 -> 1."""
    config = peft.LoraConfig(r=4, target_modules=["2", "3"], init_lora_weights=False)
    theirs = peft.get_peft_model(mlp(), config).eval()
    theirs.save_pretrained(tmp_path / "a")
    model, x = mlp().eval(), torch.randn(2, 6)
    load(model, tmp_path / "a", trainable=True)
    torch.testing.assert_close(model(x), theirs(x), rtol=0, atol=1e-5)
    again = peft.PeftModel.from_pretrained(mlp(), save(model, tmp_path / "b")).eval()
    torch.testing.assert_close(model(x), again(x), rtol=0, atol=1e-5)
    expected = model(x)
    merge(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    unmerge(model)
    assert combine(model, {"default": 2.0}, "twice").layers["3"].rank == 3
    assert len(LoRADiagnoser(model, "default").report().layers) == 2


def test_a_merged_task_is_not_loaded_into(llama: Make, saved: Path, tmp_path: Path) -> None:
    model = llama()
    load(model, saved)
    merge(model, "default")
    with pytest.raises(MergeError, match="'default' is merged into the weights.*unmerge it first"):
        load(model, saved)
    unmerge(model)
    load(model, saved)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_grouped_convolution_of_pefts_is_refused_with_the_reason(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))

    config = peft.LoraConfig(r=2, target_modules=["0"])
    peft.get_peft_model(make(), config).save_pretrained(tmp_path)
    model = make()
    with pytest.raises(AdapterFileError, match="groups=2, and PEFT's A sees all channels"):
        load(model, tmp_path)
    assert tasks(model) == ()


def test_a_sharded_model_writes_and_reads_whole_tensors(
    mlp: Make, fill: Callable[..., None], tmp_path: Path
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, fresh, x = mlp(), mlp(), torch.randn(2, 6)
    inject(model, AdapterConfig(r=2, dora=True))
    fill(model)
    expected = model(x)
    with _one_process(tmp_path):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        path = save(model, tmp_path / "a")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0)
        load(model, path)
        torch.testing.assert_close(model(x), expected)
    load(fresh, path)
    torch.testing.assert_close(fresh(x), expected)

"""save_layer and load_layer: what comes back is what was there, and what does not fit changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn.parallel import DataParallel

from orbit.adapter import AdapterConfig, inject
from orbit.core.loaded import loaded_names
from orbit.model import get_model_by_name, load_layer, save_layer
from orbit.model.errors import TargetError, WeightsError
from tests.ranks import on_ranks


class Net(nn.Module):
    """A backbone with buffers and a transposed weight, and a language model with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
        self.lm = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
        self.lm["head"].weight = self.lm["embed"].weight
        with torch.no_grad():
            self.backbone[1].running_mean.fill_(3.0)
            self.backbone[3].weight = nn.Parameter(torch.randn(8, 4).T)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(module: nn.Module, values: dict[str, torch.Tensor]) -> bool:
    now = module.state_dict()
    return now.keys() == values.keys() and all(torch.equal(now[name], values[name]) for name in values)


@pytest.mark.parametrize("name", ["backbone", "backbone.1", "lm", "lm.head", ""])
def test_a_layer_comes_back_and_the_rest_stays(name: str, tmp_path: Path) -> None:
    source, other = Net(), Net()
    path = save_layer(source, name, tmp_path / "new" / "layer.safetensors")
    before, wanted = state(other), state(get_model_by_name(source, name))
    assert load_layer(other, name, path) == ((), ())
    assert same(get_model_by_name(other, name), wanted)
    tied = ("lm.embed.weight", "lm.head.weight")
    for key, value in other.state_dict().items():
        inside = not name or key.startswith(f"{name}.") or (name == "lm.head" and key in tied)
        assert torch.equal(value, before[key]) != inside or torch.equal(
            before[key], source.state_dict()[key]
        ), key
    assert [p.name for p in path.parent.iterdir()] == ["layer.safetensors"]


def test_tied_weights_lie_in_the_file_once_and_load_into_models_tied_or_not(tmp_path: Path) -> None:
    source = Net()
    path = save_layer(source, "lm", tmp_path / "lm.safetensors")
    assert list(load_file(path)) == ["embed.weight"]
    untied = Net()
    untied.lm["head"].weight = nn.Parameter(torch.zeros(9, 4))
    load_layer(untied, "lm", path)
    assert untied.lm["head"].weight is not untied.lm["embed"].weight
    assert torch.equal(untied.lm["head"].weight, source.lm["embed"].weight)

    load_model(Net().lm, path)  # safetensors' own
    save_model(source.lm, str(tmp_path / "theirs.safetensors"))
    tied = Net()
    load_layer(tied, "lm", tmp_path / "theirs.safetensors")
    assert same(tied.lm, state(source.lm))

    save_layer(untied, "lm", path)
    load_layer(tied, "lm", path)  # two equal ones
    with torch.no_grad():
        untied.lm["head"].weight.add_(1)
    save_layer(untied, "lm", path)
    before = state(tied)
    with pytest.raises(
        WeightsError, match=r"embed\.weight and head\.weight are one tensor here and two different"
    ):
        load_layer(tied, "lm", path)
    assert same(tied, before)


def spoil(tensors: dict[str, torch.Tensor], change: str) -> None:
    if change == "missing":
        del tensors["1.running_var"]
    elif change == "unexpected":
        tensors["4.weight"] = torch.ones(1)
    elif change == "shape":
        tensors["3.weight"] = torch.ones(8, 4)
    else:
        tensors["3.bias"] = torch.ones(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"1\.running_var is missing\. Nothing was loaded"),
        ("unexpected", r"does not fit 'backbone', a Sequential: 4\.weight is unexpected"),
        ("shape", r"3\.weight has shape \(8, 4\) there and \(4, 8\) here"),
        ("dtype", r"3\.bias holds torch\.int64 there and torch\.float32 here"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: str, says: str, tmp_path: Path) -> None:
    path = save_layer(Net(), "backbone", tmp_path / "b.safetensors")
    tensors = load_file(path)
    spoil(tensors, change)
    save_file(tensors, path)
    model = Net()
    before = state(model)
    with pytest.raises(WeightsError, match=says):
        load_layer(model, "backbone", path)
    assert same(model, before)

    if change in ("shape", "dtype"):
        with pytest.raises(WeightsError, match=says):
            load_layer(model, "backbone", path, strict=False)
        assert same(model, before)
        return
    report = load_layer(model, "backbone", path, strict=False)
    assert report == ((("1.running_var",), ()) if change == "missing" else ((), ("4.weight",)))
    assert torch.equal(model.backbone[3].weight, tensors["3.weight"])


def test_a_file_that_shares_no_name_is_refused_also_without_strict(tmp_path: Path) -> None:
    path = save_layer(Net(), "lm", tmp_path / "lm.safetensors")
    with pytest.raises(WeightsError, match="no name is the layer's"):
        load_layer(Net(), "backbone", path, strict=False)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    model = Net()
    before = state(model)
    torch.save(model.backbone.state_dict(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"b\.pth is no readable safetensors file.*weights_only=True"):
        load_layer(model, "backbone", tmp_path / "b.pth")
    whole = save_layer(model, "backbone", tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-4])
    with pytest.raises(WeightsError, match="no readable safetensors file: tensor '3.weight' lies from byte"):
        load_layer(model, "backbone", tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not there"):
        load_layer(model, "backbone", tmp_path / "none.safetensors")
    assert same(model, before)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_a_name_that_promises_a_pickle_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"call the file backbone\.safetensors"):
        save_layer(Net(), "backbone", tmp_path / f"backbone{suffix}")
    assert list(tmp_path.iterdir()) == []


class WithExtra(nn.Linear):
    def get_extra_state(self) -> str:
        return "extra"

    def set_extra_state(self, state: str) -> None:
        raise AssertionError(state)


NO_NUMBERS = nn.Parameter(torch.empty(2, dtype=torch.bits8), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (WithExtra(2, 2), r"x\._extra_state is a str, and the file holds tensors"),
        (nn.LazyLinear(2), r"x\.weight has no values yet"),
        (nn.Linear(2, 2, device="meta"), r"x\.weight has no values yet \(meta\)"),
        (nn.ReLU(), "'x' is a ReLU without weights"),
        (
            nn.ParameterList([torch.ones(2).to_sparse()]),
            r"x\.0 is torch\.sparse_coo, and the file holds dense",
        ),
        (
            nn.ParameterList([nn.Parameter(torch.empty(2, dtype=torch.bits8), requires_grad=False)]),
            "'x' cannot be written as safetensors",
        ),
    ],
    ids=["extra", "lazy", "meta", "empty", "sparse", "bits"],
)
def test_what_cannot_be_saved_leaves_the_old_file(layer: nn.Module, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WeightsError, match=says):
        save_layer(nn.ModuleDict({"x": layer}), "x", path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_layer_on_the_meta_device_is_not_filled_in_silence(tmp_path: Path) -> None:
    path = save_layer(nn.ModuleDict({"x": nn.Linear(2, 2)}), "x", tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"weight is on the meta device \(call to_empty"):
        load_layer(nn.ModuleDict({"x": nn.Linear(2, 2, device="meta")}), "x", path)
    lazy = nn.ModuleDict({"x": nn.LazyLinear(2)})
    load_layer(lazy, "x", path)  # a lazy layer takes its shape from the file
    assert lazy["x"].weight.shape == (2, 2)


def test_the_layers_own_dtype_stays(tmp_path: Path) -> None:
    source = Net().to(torch.float64)
    path = save_layer(source, "backbone", tmp_path / "b.safetensors")
    model = Net().to(torch.bfloat16)
    load_layer(model, "backbone", path)
    assert torch.equal(model.backbone[3].weight, source.backbone[3].weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["backbone", "backbone.3", ""])
def test_wrapped_models_are_seen_through(name: str, tmp_path: Path) -> None:
    source, inner = Net(), Net()
    path = save_layer(source, name, tmp_path / "plain.safetensors")
    inner.backbone[3] = torch.compile(inner.backbone[3], backend="eager")
    inner.backbone = torch.compile(inner.backbone, backend="eager")
    model = torch.compile(DataParallel(inner), backend="eager")
    load_layer(model, name, path)
    again = save_layer(model, name, tmp_path / "wrapped.safetensors")
    assert load_file(again).keys() == load_file(path).keys()
    assert all(torch.equal(value, load_file(path)[key]) for key, value in load_file(again).items())
    assert get_model_by_name(model, "backbone.3") is inner.backbone._orig_mod[3]
    assert get_model_by_name(model, "backbone") is inner.backbone


def test_adapters_go_along_and_survive_a_file_without_them(tmp_path: Path) -> None:
    plain = save_layer(Net(), "lm", tmp_path / "plain.safetensors")
    model = Net()
    inject(model, AdapterConfig(r=2, targets=("embed",)))
    adapted = save_layer(model, "lm", tmp_path / "adapted.safetensors")
    kept = {name: value for name, value in state(model.lm).items() if "lora" in name}
    assert kept
    report = load_layer(model, "lm", plain)
    assert set(report.missing) == set(kept)
    assert all(torch.equal(model.lm.state_dict()[name], value) for name, value in kept.items())
    assert torch.equal(model.lm["embed"].weight, load_file(plain)["embed.weight"])
    load_layer(model, "lm", adapted)
    with pytest.raises(WeightsError, match=r"embed\.lora_embedding_A\.default\.weight is unexpected"):
        load_layer(Net(), "lm", adapted)
    tensors = load_file(adapted)
    del tensors["embed.lora_embedding_A.default.weight"]
    save_file(tensors, adapted)
    with pytest.raises(WeightsError, match=r"embed\.lora_embedding_A\.default\.weight is missing"):
        load_layer(model, "lm", adapted)


def test_what_was_loaded_is_noted_and_the_note_goes_along(tmp_path: Path) -> None:
    path = save_layer(Net(), "backbone.1", tmp_path / "norm.safetensors")
    model = Net()
    load_layer(model, "backbone.1", path)
    note = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert loaded_names(copy.deepcopy(model).backbone[1].double()) == note
    assert loaded_names(model.backbone[3]) == frozenset()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "backbon.1",
            r"no layer 'backbon\.1': the model, a Net, has no 'backbon'; did you mean 'backbone'\?",
        ),
        ("backbone.9", r"backbone, a Sequential, has no '9'; it has '0', '1', '2', '3'"),
        ("backbone.0.weight", r"backbone\.0, a Conv2d, has no layers of its own"),
        ("lm.haed", r"did you mean 'lm\.head'\?"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_ended(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=says):
        get_model_by_name(Net(), name)
    with pytest.raises(TargetError, match=says):
        save_layer(Net(), name, tmp_path / "x.safetensors")
    with pytest.raises(TargetError, match=says):
        load_layer(Net(), name, tmp_path / "x.safetensors")


def test_a_sharded_layer_is_written_whole_by_the_first_rank(tmp_path: Path) -> None:
    assert on_ranks("tests.model.rank_cases:save_and_load", 2, str(tmp_path)) == [True, True]
    tensors = load_file(tmp_path / "layer.safetensors")
    assert tensors["0.weight"].shape == (3, 5)
    assert ("2.weight" in tensors) != ("4.weight" in tensors)
    assert [file.name for file in tmp_path.iterdir()] == ["layer.safetensors"]


def test_tensors_that_share_a_part_of_their_memory_come_back(tmp_path: Path) -> None:
    def shared() -> nn.Module:
        layer = nn.Linear(2, 3)
        layer.register_buffer("first_row", layer.weight.detach()[0])
        return nn.ModuleDict({"x": layer})

    source, model = shared(), shared()
    load_layer(model, "x", save_layer(source, "x", tmp_path / "x.safetensors"))
    assert same(model, state(source))

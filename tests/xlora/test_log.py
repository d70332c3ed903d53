"""The log of scalings: what is remembered, and that it comes back from disk as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from orbit.xlora import XLoRAError, load_scalings_log
from orbit.xlora.log import save_scalings_log
from tests.xlora.folders import TOKENS, base, experts, mixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return mixture(experts(tmp_path_factory.mktemp("experts"), "math", "law", "art"))


def logged(model, *inputs: Tensor) -> list[Tensor]:
    model.disable_scalings_logging()
    model.enable_scalings_logging()
    for tokens in inputs:
        model(tokens)
    return model.get_scalings_log()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_equal(read: list[Tensor], log: list[Tensor]) -> None:
    assert len(read) == len(log)
    for one, other in zip(read, log, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_one_shape_is_one_array(model, tmp_path: Path) -> None:
    log = logged(model, TOKENS, TOKENS + 1, TOKENS + 2)
    assert all(entry.grad_fn is None for entry in log), "logged with gradients on"
    model.flush_log_scalings(str(tmp_path / "a" / "log"))
    assert names(tmp_path / "a") == ["log.npy"]
    assert np.load(tmp_path / "a" / "log.npy").shape == (3, 2, 5, 14, 3)
    assert_equal(load_scalings_log(tmp_path / "a" / "log"), log)
    assert_equal(load_scalings_log(tmp_path / "a" / "log.npy"), log)
    assert_equal(model.get_scalings_log(), log)


def test_two_sequence_lengths_are_two_arrays_and_the_order(model, tmp_path: Path) -> None:
    log = logged(model, TOKENS, TOKENS[:, :3], TOKENS + 1, TOKENS[:, 1:4])
    model.flush_log_scalings(tmp_path / "log")
    assert names(tmp_path) == ["log-3.npy", "log-5.npy", "log-mapping.json"]
    mapping = json.loads((tmp_path / "log-mapping.json").read_text())
    assert mapping == {"log-5.npy": [0, 2], "log-3.npy": [1, 3]}
    assert np.load(tmp_path / "log-3.npy").shape == (2, 2, 3, 14, 3)
    assert_equal(load_scalings_log(tmp_path / "log"), log)


def test_one_sequence_length_with_several_batch_sizes(model, tmp_path: Path) -> None:
    log = logged(model, TOKENS, TOKENS[:1], TOKENS[:, :3], TOKENS[1:])
    model.flush_log_scalings(tmp_path / "log")
    assert names(tmp_path) == ["log-3.npy", "log-5-0.npy", "log-5-1.npy", "log-mapping.json"]
    assert_equal(load_scalings_log(tmp_path / "log"), log)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3, 5)])
def test_bfloat16_comes_back_as_it_was(lengths: tuple[int, ...], tmp_path: Path) -> None:
    model = mixture(experts(tmp_path, "math", "law")).bfloat16()
    log = logged(model, *(TOKENS[:, :length] for length in lengths))
    assert {entry.dtype for entry in log} == {torch.bfloat16}
    model.flush_log_scalings(tmp_path / "logs" / "log")
    assert np.load(sorted((tmp_path / "logs").glob("*.npy"))[0]).dtype == np.float32, "readable by numpy"
    assert_equal(load_scalings_log(tmp_path / "logs" / "log"), log)


def test_a_second_flush_replaces_the_first(model, tmp_path: Path) -> None:
    (tmp_path / "log-7.npy.txt").write_text("mine")
    for inputs in ([TOKENS, TOKENS[:, :3]], [TOKENS], [TOKENS[:, :2], TOKENS[:, :4]]):
        log = logged(model, *inputs)
        model.flush_log_scalings(tmp_path / "log")
        assert_equal(load_scalings_log(tmp_path / "log"), log)
    assert names(tmp_path) == ["log-2.npy", "log-4.npy", "log-7.npy.txt", "log-mapping.json"]


def test_the_public_implementations_files(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes paths into the mapping, from wherever it ran."""
    log = logged(model, TOKENS, TOKENS[:, :3], TOKENS + 1)
    np.save(tmp_path / "log-5.npy", torch.stack([log[0], log[2]]).numpy())
    np.save(tmp_path / "log-3.npy", log[1][None].numpy())
    mapping = {"./elsewhere/log-5.npy": [0, 2], "./elsewhere/log-3.npy": [1]}
    (tmp_path / "log-mapping.json").write_text(json.dumps(mapping))
    assert_equal(load_scalings_log(tmp_path / "log"), log)


def test_verbose_says_what_is_read(model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(model, TOKENS)
    model.flush_log_scalings(tmp_path / "log")
    load_scalings_log(tmp_path / "log")
    assert capsys.readouterr().out == ""
    load_scalings_log(tmp_path / "log", verbose=True)
    assert "log.npy: scalings (1, 2, 5, 14, 3)" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["log.npy", "log.txt", "run.v1"])
def test_a_path_with_an_extension_is_refused(path: str, model, tmp_path: Path) -> None:
    logged(model, TOKENS)
    with pytest.raises(XLoRAError, match="extension"):
        model.flush_log_scalings(tmp_path / path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_without_a_name_is_refused(path: str) -> None:
    with pytest.raises(XLoRAError, match="is a folder"):
        save_scalings_log(path, [torch.rand(1, 2, 3, 2)])
    with pytest.raises(XLoRAError, match="is a folder"):
        load_scalings_log(path)


def test_an_empty_log_is_refused(tmp_path: Path) -> None:
    model = mixture(experts(tmp_path / "experts", "math"), base())
    model(TOKENS)
    with pytest.raises(XLoRAError, match="enable_scalings_logging"):
        model.flush_log_scalings(tmp_path / "new" / "log")
    assert names(tmp_path) == ["experts"]


def two_lengths(folder: Path) -> None:
    save_scalings_log(folder / "log", [torch.rand(2, n, 4, 3) for n in (5, 3, 5)])


def edit(mapping: str):
    def change(folder: Path) -> None:
        (folder / "log-mapping.json").write_text(mapping)

    return change


DAMAGES = {
    "a file is missing": (lambda folder: (folder / "log-3.npy").unlink(), "no file .*log-3.npy"),
    "a file is cut off": (lambda folder: (folder / "log-3.npy").write_bytes(b"\x93NUM"), "cannot be read"),
    "a file holds a pickle": (
        lambda folder: np.save(folder / "log-3.npy", np.array([{}]), allow_pickle=True),
        "cannot be read",
    ),
    "a file holds something else": (
        lambda folder: np.save(folder / "log-3.npy", np.zeros(3)),
        "holds no scalings",
    ),
    "a file is half a zip": (
        lambda folder: (folder / "log-3.npy").write_bytes(b"PK\x03\x04"),
        "cannot be read",
    ),
    "a file has another machine's bytes": (
        lambda folder: np.save(folder / "log-3.npy", np.zeros((1, 2, 3, 4, 3), ">f4")),
        "holds no scalings",
    ),
    "the mapping is nested without end": (edit("[" * 100_000), "not JSON"),
    "the mapping is cut off": (edit('{"log-5.npy": [0,'), "not JSON"),
    "the mapping is a list": (edit("[1, 2]"), "must map files"),
    "the mapping has another number": (edit('{"log-5.npy": [0], "log-3.npy": [1]}'), "holds 2 scalings"),
    "the mapping leaves a place out": (edit('{"log-5.npy": [0, 3], "log-3.npy": [1]}'), "every place"),
    "the mapping has a place twice": (edit('{"log-5.npy": [0, 1], "log-3.npy": [1]}'), "every place"),
    "the mapping has a dtype that is none": (
        edit('{"log-5.npy": {"indices": [0, 2], "dtype": "load"}, "log-3.npy": [1]}'),
        "must map files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_is_refused(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    two_lengths(tmp_path)
    assert len(load_scalings_log(tmp_path / "log")) == 3
    change(tmp_path)
    with pytest.raises(XLoRAError, match=message):
        load_scalings_log(tmp_path / "log")


def test_a_mapping_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "log-mapping.json").write_text('"mine"')
    with pytest.raises(XLoRAError, match="in the way"):
        two_lengths(tmp_path)
    assert names(tmp_path) == ["log-mapping.json"]


def test_only_files_of_the_log_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / "log-mapping.json").write_text('{"mine": [0]}')
    two_lengths(tmp_path)
    assert "mine" in names(tmp_path)
    assert len(load_scalings_log(tmp_path / "log")) == 3


def test_two_logs_never_share_a_file(tmp_path: Path) -> None:
    """`log` of length 5 and `log-5` of one shape both write log-5.npy."""
    other = [torch.rand(2, 5, 4, 3)]
    two_lengths(tmp_path)
    with pytest.raises(XLoRAError, match=r"log-5.npy is of the log .*log-mapping.json"):
        save_scalings_log(tmp_path / "log-5", other)
    (tmp_path / "log-mapping.json").unlink()
    save_scalings_log(tmp_path / "log-5", other)
    with pytest.raises(XLoRAError, match=r"log-5.npy is there, and of no log at .*log"):
        two_lengths(tmp_path)
    torch.testing.assert_close(load_scalings_log(tmp_path / "log-5"), other, rtol=0, atol=0)

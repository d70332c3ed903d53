"""What a file of unknown origin would do is found out before it does it."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faults import forged
from orbit.core import CheckpointError, load_checkpoint, save_checkpoint
from orbit.core.checkpoint import screen


@pytest.mark.parametrize("forge", forged.CHECKPOINTS, ids=lambda forge: forge.__name__)
def test_a_forged_checkpoint_is_refused(tmp_path: Path, forge: Any) -> None:
    """Time and memory are measured by the fault suite's case `malicious`."""
    path = forge(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(path)
    assert forged.CHECKPOINTS[forge] in str(refused.value)
    assert not (tmp_path / forged.CANARY).exists()


def test_all_that_a_checkpoint_may_hold_passes(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    state = {
        "step": 3,
        "tensors": [torch.ones(2, dtype=dtype) for dtype in (torch.bfloat16, torch.int8, torch.bool)],
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
        "uint16": torch.ones(2, dtype=torch.uint16),
        "view": shared[2:8].view(2, 3).T,
        "shared": shared,
        "expanded": torch.ones(1).expand(1000),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.0),
        "parameter": nn.Parameter(torch.ones(2)),
        "model": nn.Linear(2, 3).state_dict(),
        "plain": [None, True, 10**30, -1, 1.5, 1 + 2j, "text", b"\x00\xff", {1, 2}, (1, (2,))],
        "kinds": [torch.float32, torch.device("cpu"), torch.Size([1, 2]), OrderedDict(a=1), Counter("aab")],
    }
    loaded = load_checkpoint(save_checkpoint(state, tmp_path / "checkpoint_step_3.pt"))
    assert loaded["plain"] == state["plain"]
    assert loaded["kinds"] == state["kinds"]
    for name in ("float8", "complex", "uint16", "view", "shared", "expanded", "empty", "scalar", "parameter"):
        assert loaded[name].dtype == state[name].dtype
        assert str(loaded[name]) == str(state[name])
    torch.save(state, tmp_path / "by hand.pt")
    assert load_checkpoint(tmp_path / "by hand.pt")["step"] == 3


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_1.pt"
    with pytest.raises(CheckpointError, match="dense tensors"):
        save_checkpoint({"sparse": torch.eye(3).to_sparse()}, path)
    with pytest.raises(CheckpointError, match="opcodes"):
        save_checkpoint({"list": [0.5] * 2_000_000}, path)
    assert list(tmp_path.iterdir()) == []


class Own(torch.Tensor):
    """A tensor class of the user's."""


def test_a_tensor_class_of_ones_own_passes_once_it_is_made_known(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3).as_subclass(Own)}, tmp_path / "own.pt")
    with pytest.raises(CheckpointError, match=r"names .*Own.*add_safe_globals"):
        load_checkpoint(tmp_path / "own.pt")
    with torch.serialization.safe_globals([Own]):
        assert type(load_checkpoint(tmp_path / "own.pt")["w"]) is Own


def test_a_file_over_four_gigabytes_has_its_sizes_elsewhere(tmp_path: Path) -> None:
    """Sparse on the disk: 4.4 GB of zeros that nobody writes or reads."""
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        torch.save({"w": torch.empty(1_100_000_000), "b": torch.ones(3)}, path)
    assert path.stat().st_size > 2**32
    screen(path)


def test_whatever_a_byte_is_changed_to_the_error_is_ours(tmp_path: Path) -> None:
    """In 8,000 such files tried once, none crashed the process or raised anything else."""
    path = tmp_path / "x.pt"
    torch.save({"step": 3, "w": torch.ones(3), "plain": [(1, (2, 3)), {"a": {"b": None}}, {1, 2}]}, path)
    whole = path.read_bytes()
    pickled = range(whole.index(b"\x80\x02"), whole.index(b"PK\x07\x08"))
    chance, refused = random.Random(5), 0
    for _ in range(300):
        changed = bytearray(whole)
        changed[chance.choice(pickled)] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 200

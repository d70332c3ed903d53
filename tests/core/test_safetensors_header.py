"""Headers that the library itself would take, or choke on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from faults import forged
from orbit.adapter import AdapterFileError, load
from orbit.core.safetensors_header import check_header
from tests import tiny


@pytest.mark.parametrize("forge", forged.ADAPTERS, ids=lambda forge: forge.__name__)
def test_a_forged_adapter_is_refused(tmp_path: Path, forge: Any) -> None:
    model = tiny.model()
    with pytest.raises(AdapterFileError) as refused:
        load(model, forge(tmp_path))
    assert forged.ADAPTERS[forge] in str(refused.value)
    assert not (tmp_path / forged.CANARY).exists()


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.empty(0), "c/d": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "text": '{"[[,": 1}'})
    check_header(tmp_path / "x.safetensors")

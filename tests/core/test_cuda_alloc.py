"""cuda_alloc: the allocator's own settings, read back from the allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orbit.core.cuda_alloc import cuda_alloc

SRC = Path(__file__).parents[2] / "src"
OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither variable is set, and both are as before after the test."""
    for name in (OLD, NEW):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in (OLD, NEW)} | variables | {"PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)


def test_the_allocator_reads_what_was_set_after_torch_was_imported() -> None:
    program = (
        "import torch; from orbit.core.cuda_alloc import cuda_alloc; print(cuda_alloc(256, True)); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    others = {OLD: "max_split_size_mb:64,roundup_power2_divisions:[256:1,>:2]", NEW: "max_split_size_mb:32"}
    done = run(program, **others)
    assert done.returncode == 0, done.stderr
    wanted = "roundup_power2_divisions:[256:1,>:2],max_split_size_mb:256,expandable_segments:True"
    assert done.stdout.split() == [wanted, wanted]


def test_other_settings_stay(clean: pytest.MonkeyPatch) -> None:
    assert cuda_alloc() == os.environ[NEW] == "max_split_size_mb:128"
    assert cuda_alloc(None, expandable_segments=False) == "max_split_size_mb:128,expandable_segments:False"
    assert cuda_alloc(64) == os.environ[NEW] == "expandable_segments:False,max_split_size_mb:64"
    assert OLD not in os.environ
    clean.delenv(NEW)
    clean.setenv(OLD, "garbage_collection_threshold:0.8")
    assert cuda_alloc(20) == os.environ[OLD] == "garbage_collection_threshold:0.8,max_split_size_mb:20"
    assert NEW not in os.environ


@pytest.mark.parametrize("size", [19, 0, -5, 32.0, "128", True])
def test_a_size_that_the_allocator_would_refuse(size: object) -> None:
    with pytest.raises(ValueError, match=r"max_split_size_mb is a whole number of MiB, and at least 20"):
        cuda_alloc(size)  # type: ignore[arg-type]
    assert NEW not in os.environ


def test_nothing_to_set() -> None:
    with pytest.raises(ValueError, match="sets nothing"):
        cuda_alloc(None)


def test_after_cuda_has_started(clean: pytest.MonkeyPatch) -> None:
    clean.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"too late: CUDA has started.*PYTORCH_ALLOC_CONF=max_split_size_mb"
    ):
        cuda_alloc(128)
    assert NEW not in os.environ


@pytest.mark.gpu
def test_on_cuda_it_is_read_at_the_first_tensor_and_refused_after_it() -> None:
    program = (
        "import torch; from orbit.core.cuda_alloc import cuda_alloc; cuda_alloc(256); torch.ones(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['max_split_size'] >> 20); cuda_alloc(128)"
    )
    done = run(program)
    assert done.stdout.strip() == "256"
    assert "RuntimeError: cuda_alloc() comes too late" in done.stderr

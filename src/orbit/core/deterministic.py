"""Runs that give the same bits each time, on CUDA too, for as long as they run.

PyTorch's own switch (`torch.use_deterministic_algorithms`) is for the whole process; here it is on inside of the run's
loops and stands as before outside of them; `seed_everything(deterministic=True)` turns it on for good. An operation
that has no deterministic form raises and names itself. cuBLAS needs `CUBLAS_WORKSPACE_CONFIG` in the environment before
CUDA starts; where it is not set, this sets it, in time.

Seeds are another matter: `orbit.seed_everything(seed)`, before the model is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_VARIABLE, _VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def prepare() -> None:
    """Set `CUBLAS_WORKSPACE_CONFIG` if it is not set.

    Raises:
        RuntimeError: it is not set to a deterministic value, and CUDA has started or somebody wanted another value.
    """
    value = os.environ.get(_VARIABLE)
    if value in _VALUES or not torch.backends.cuda.is_built():
        return
    if value is not None or torch.cuda.is_initialized():
        found = "not set" if value is None else value
        late = ", and CUDA has started" if torch.cuda.is_initialized() else ""
        raise RuntimeError(
            f"deterministic=True needs {_VARIABLE}={_VALUES[0]} in the environment before CUDA starts; it is {found}"
            f"{late}: start the program with `{_VARIABLE}={_VALUES[0]} python ...`, or make the trainer first, before "
            "anything is on the GPU"
        )
    os.environ[_VARIABLE] = _VALUES[0]


def switch_on(mode: bool | str) -> None:
    """Deterministic algorithms alone from now on, if `mode` is True; with "warn", operations that have none warn.

    Raises:
        ValueError: `mode` is neither of these, nor False.
        RuntimeError: see `prepare`.
    """
    if mode not in (True, False, "warn"):
        raise ValueError(f'deterministic={mode!r}: give True, False or "warn"')
    if mode is not False:
        prepare()
        _choose(mode)


def _choose(mode: bool | str) -> None:
    torch.use_deterministic_algorithms(True, warn_only=mode == "warn")
    torch.backends.cudnn.benchmark = False  # it picks the fastest algorithm of the moment


@contextmanager
def algorithms(mode: bool | str) -> Iterator[None]:
    """Deterministic algorithms alone inside, if `mode` is True; with "warn", operations that have none warn."""
    if mode is False:
        yield
        return
    enabled, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    _choose(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark

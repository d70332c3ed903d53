"""Run `examples/06_ranks.py` in this process, as one of its ranks."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import pytest

from orbit.core import runtime

EXAMPLE = Path(__file__).parents[2] / "examples/06_ranks.py"


def run(parallel: str | None, folder: str) -> str:
    """What it prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setitem(os.environ, "WORLD_SIZE", str(runtime.world_size()))  # torchrun sets it
        spec = importlib.util.spec_from_file_location("ranks_example", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(parallel, Path(folder))
    return printed.getvalue()

"""A mixture trained by two processes is what one process trains, and none of its parameters is unused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(WORKER.parents[2] / name) for name in ("src", ".")),
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(errors) == 8
    assert {case: error for case, error in errors.items() if error > 2e-5} == {}

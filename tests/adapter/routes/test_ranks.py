"""Law 9: ranks whose rows use different tasks train what one process would train on all the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from orbit.adapter.owners import Down, ModuleSlot, Slot, Up, Whole
from orbit.adapter.routes.ranks import touched

WORKER = Path(__file__).with_name("ranks_worker.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_are_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER)]
    paths = os.pathsep.join(str(WORKER.parents[3] / name) for name in ("src", "."))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(errors) == 14
    assert {case: error for case, error in errors.items() if error > 5e-5} == {}


def test_what_is_touched_gets_zeros_and_changes_nothing() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    one = Slot(Down(torch.randn(2, 3)), Up(torch.randn(4, 2), 2.0))
    other = Slot(Down(torch.randn(2, 3)), Up(torch.randn(4, 2), 2.0))
    module, frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    y, rest = touched((x, None), [one, Whole({"weight": other}), ModuleSlot(module), ModuleSlot(frozen)])
    assert torch.equal(y, x)
    assert rest is None
    y.sum().backward()
    for owner in (*one[:2], *other[:2]):
        assert torch.equal(owner.weight.grad, torch.zeros_like(owner.weight))
    assert not module.weight.grad.any()
    assert frozen.weight.grad is None
    assert torch.equal(x.grad, torch.ones_like(x))

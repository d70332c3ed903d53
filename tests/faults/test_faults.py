"""Every case of the fault suite in its short form, and the suite's own parts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import CASES
from faults.processes import ChildError, fork, in_child, wait

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def suite() -> Iterator[subprocess.Popen[str]]:
    """Imports PyTorch once and forks a process a case."""
    command = [sys.executable, "-W", "error", "-m", "faults", "-", "--short"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.communicate()


@pytest.mark.parametrize("name", CASES)
def test_the_case_holds(suite: subprocess.Popen[str], name: str) -> None:
    assert suite.stdin is not None
    assert suite.stdout is not None
    print(name, file=suite.stdin, flush=True)
    result = json.loads(suite.stdout.readline())
    assert result["holds"], result


def test_every_file_of_the_room_is_a_case_or_a_part_of_the_suite() -> None:
    parts = {"__init__", "__main__", "cases", "processes", "result"}
    shared = {path.stem for path in (ROOT / "faults").glob("*.py") if "def run(" not in path.read_text()}
    assert {path.stem for path in (ROOT / "faults").glob("*.py")} - parts - shared == set(CASES)


def test_a_child_gives_back_what_it_returns_or_why_it_did_not() -> None:
    assert in_child(lambda: {"a": [1, 2.5, None]}) == {"a": [1, 2.5, None]}
    with pytest.raises(ChildError, match="ZeroDivisionError"):
        in_child(lambda: 1 / 0)
    with pytest.raises(ChildError, match="ended with -9"):
        in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(TimeoutError, match="was killed"):
        in_child(lambda: time.sleep(60), seconds=0.1)
    assert wait(fork(lambda: sys.exit(7)), 10) == 7

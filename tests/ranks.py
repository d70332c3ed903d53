"""Run a function on several ranks over gloo, in processes that are forked from one that has imported everything.

    results = on_ranks("tests.core.parallel_cases:train", 2, folder, "ddp")     one value a rank, any picklable one

Starting two interpreters that import PyTorch takes seconds; forking takes milliseconds. The server imports the
function's module too before it forks: what that imports at its top, no rank has to import again. The server is a
process of its own, since the test process may have threads. A rank that raises fails the test with its traceback;
ranks that do not end in time are killed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class RankError(AssertionError):
    """A rank raised, or did not end."""


def on_ranks(function: str, ranks: int, *args: Any, seconds: float = 60.0) -> list[Any]:
    """What `module:function(*args)` returns on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request"
        request.write_bytes(pickle.dumps((function, ranks, args, seconds)))
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{request}\n")
        server.stdin.flush()
        assert server.stdout.readline() == "done\n", "the server of ranks has died"
        answers = [_answer(Path(folder), rank) for rank in range(ranks)]
    failed = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in answers]


def _answer(folder: Path, rank: int) -> tuple[bool, Any]:
    file = folder / f"answer{rank}"
    return pickle.loads(file.read_bytes()) if file.exists() else (False, "did not end in time, or was killed")


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    server = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.ranks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    atexit.register(server.kill)
    return server


def _serve() -> None:
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    import orbit.engine
    import orbit.plugin
    import orbit.trainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = Path(line.strip())
        function, ranks, args, seconds = pickle.loads(request.read_bytes())
        with contextlib.suppress(Exception):  # each rank finds it again, and says so
            importlib.import_module(function.split(":")[0])
        children = [_fork(request.parent, function, rank, ranks, args, seconds) for rank in range(ranks)]
        _wait(children, seconds)
        print("done", flush=True)


def _fork(folder: Path, function: str, rank: int, ranks: int, args: Any, seconds: float) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(2, 1)  # what a rank prints must not look like the server's answer
    try:
        value = (True, _work(folder, function, rank, ranks, args, seconds))
    except BaseException:
        value = (False, traceback.format_exc())
    partial = folder / f"partial{rank}"
    partial.write_bytes(pickle.dumps(value))
    partial.rename(folder / f"answer{rank}")
    os._exit(0)


def _work(folder: Path, function: str, rank: int, ranks: int, args: Any, seconds: float) -> Any:
    import torch.distributed as dist

    module, name = function.split(":")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=seconds),
    )
    return getattr(importlib.import_module(module), name)(*args)


def _wait(children: list[int], seconds: float) -> None:
    left, end = set(children), time.monotonic() + seconds
    while left and time.monotonic() < end:
        left = {child for child in left if os.waitpid(child, os.WNOHANG)[0] == 0}
        time.sleep(0.005)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _serve()

"""Processes that a case forks and may kill: cheap, since the parent has imported everything.

pid = fork(work)                    runs `work()` in a process of its own
wait(pid, seconds)                  how it ended, as subprocess says it: 0, an exit code, or -signal
in_child(work, seconds)             runs `work()` there and gives back what it returns
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def fork(work: Callable[[], object]) -> int:
    """Run `work()` in a forked process, which never returns here; its number.

    Its exit code is 0, that of a SystemExit, or 1 after any other exception, which it prints.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int:
    """How a child ended: its exit code, or -signal. After `seconds` it is killed; TimeoutError then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"process {child} still ran after {seconds} s and was killed")


def in_child(work: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `work()` returns in a forked process; it must be JSON.

    Raises:
        ChildError: it raised or was killed; the message has its traceback. TimeoutError: it took too long.
    """
    read, write = os.pipe()

    def told() -> None:
        os.close(read)
        try:
            answer = json.dumps({"value": work()})
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc()})
        with os.fdopen(write, "w") as pipe:
            pipe.write(answer)

    child = fork(told)
    os.close(write)
    text, end = b"", time.monotonic() + seconds
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            part = pipe.read(1 << 16)
            if not part:
                break
            text += part
    code = wait(child, max(0.5, end - time.monotonic()))
    answer = json.loads(text) if text else {"error": f"the process ended with {code} and said nothing"}
    if "error" in answer:
        raise ChildError(answer["error"])
    return answer["value"]


class ChildError(RuntimeError):
    """A forked process failed."""

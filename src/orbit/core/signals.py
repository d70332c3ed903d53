"""Signals that ask a run to end: the first is noted, a second one ends the process within a second.

    first     noted; the loop goes on to a place where it can be left
    second    of any kind. A handler of the user's own is called. Else the child processes (a loader's workers) are
              killed, and the signal does what it does without us: SIGINT is a KeyboardInterrupt, others end the process

Python calls handlers between two lines of the main thread; inside a long call of C (a kernel, a collective that waits
for a rank that is dead) there are none. So a thread reads the signals too, from the descriptor that Python's own C
handler writes to at once, and ends the process with 128 + signal where the main thread has not answered the second
within half a second. The same signal within a tenth of a second is the same one: `timeout` and some schedulers send it
to a process and then to its group.

Forked processes get the old handlers back. A loader's workers, to whom a terminal and torchrun send the same signals,
ignore them (`core/feeding/workers.py`): they are needed until the run has come to its end.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from orbit.core.feeding.workers import end_all

_ECHO, _GRACE = 0.1, 0.5  # seconds

_listening: list[Listener] = []


class Listener:
    """Hears signals for a run, from `listen()` to `close()`, which is called in the main thread as well.

    Args:
        numbers: the signals.
        note: called with the number of the first, inside a signal handler.
    """

    def __init__(self, numbers: Sequence[signal.Signals], note: Callable[[int], None]) -> None:
        self.numbers, self.note = list(numbers), note
        self._first: tuple[int, float] | None = None
        self._answered = False  # the main thread has come to handle a second one
        self._previous: dict[int, Any] = {}
        self._below = -1

    def listen(self) -> None:
        self._first, self._answered = None, False
        self._previous = {number: signal.signal(number, self._receive) for number in self.numbers}
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._below = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="orbit-signals", daemon=True).start()
        _listening.append(self)

    def close(self) -> None:
        if self not in _listening:
            return
        _listening.remove(self)
        self._restore()
        self._write.close()  # the thread ends

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        own, current = self._write.fileno(), signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(self._below if current == own else current)

    def _is_second(self, number: int, first: tuple[int, float]) -> bool:
        return number != first[0] or time.monotonic() - first[1] > _ECHO

    def _receive(self, number: int, frame: Any) -> None:
        if self._first is None:
            self._first = number, time.monotonic()
            self.note(number)
        elif self._is_second(number, self._first):
            self._answered = True
            previous = self._previous[number]
            if self._is_users(previous):
                previous(number, frame)
                return
            end_all()
            if previous is signal.default_int_handler:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @staticmethod
    def _is_users(handler: Any) -> bool:
        return callable(handler) and handler is not signal.default_int_handler

    def _watch(self) -> None:
        """In a thread of its own: a second signal that the main thread does not answer."""
        first: tuple[int, float] | None = None
        with self._read:
            while sent := self._read.recv(4096):
                if self._below != -1:
                    os.write(self._below, sent)
                for number in sent:
                    if number not in self._previous:
                        continue
                    if first is None:
                        first = number, time.monotonic()
                    elif self._is_second(number, first) and not self._is_users(self._previous[number]):
                        time.sleep(_GRACE)
                        if not self._answered and self in _listening:
                            end_all()
                            os._exit(128 + number)


def heard() -> list[int]:
    """The signals that runs of this process hear now."""
    return sorted({number for listener in _listening for number in listener.numbers})


def _forget() -> None:
    """In a forked process: it is no run, and must not write to this one's thread."""
    while _listening:
        _listening.pop()._restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

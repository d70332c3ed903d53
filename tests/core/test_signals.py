"""The first signal is noted, the second ends the process; what a run does on the first stands in the fault suite."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from faults.processes import fork, wait
from orbit.core.feeding.feed import Feed
from orbit.core.signals import Listener, heard
from tests import tiny

TERM, INT = signal.SIGTERM, signal.SIGINT
APART = 0.4  # seconds: further apart than an echo, also for a process that is just forking


class Run:
    """A forked process that listens and then does `work`; it says through a pipe that it has begun."""

    def __init__(self, work: Callable[[Listener, list[int]], None]) -> None:
        read, write = os.pipe()

        def go() -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a KeyboardInterrupt prints itself
            noted: list[int] = []
            listener = Listener([TERM, INT], noted.append)
            listener.listen()
            os.write(write, b"x")
            work(listener, noted)

        self.pid = fork(go)
        os.read(read, 1)
        os.close(read)
        os.close(write)

    def send(self, *numbers: int) -> Run:
        for number in numbers:
            os.kill(self.pid, number)
            time.sleep(APART)
        return self

    def end(self) -> tuple[int, bool]:
        """How it ended, and whether within a second of now."""
        began = time.monotonic()
        return wait(self.pid, 20), time.monotonic() - began < 1


def sleep(listener: Listener, noted: list[int]) -> None:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        time.sleep(15)


def deadlock(listener: Listener, noted: list[int]) -> None:
    """In C, without Python's lock; signals do not wake it."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def fetch_forever(listener: Listener, noted: list[int]) -> None:
    """Waits for a worker that sleeps."""

    class Sleepy(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            time.sleep(15)
            return index

    list(Feed(DataLoader(Sleepy(), num_workers=1)).epoch(0))


@pytest.mark.parametrize("work", [sleep, deadlock, fetch_forever])
@pytest.mark.parametrize("numbers", [(TERM, TERM), (INT, INT), (TERM, INT), (INT, TERM)])
def test_a_second_signal_of_any_kind_ends_the_process_within_a_second(work: Any, numbers: Any) -> None:
    """SIGINT is a KeyboardInterrupt (exit code 1 here), SIGTERM death by it; 128 + signal where C does not return."""
    code, soon = Run(work).send(*numbers).end()
    assert soon
    assert code == (128 + numbers[1] if work is deadlock else {TERM: -TERM, INT: 1}[numbers[1]])


def test_one_signal_sent_twice_at_once_is_one() -> None:
    def answer(listener: Listener, noted: list[int]) -> None:
        for _ in range(2):
            os.kill(os.getpid(), TERM)
        time.sleep(0.7)  # longer than the thread waits
        listener.close()
        raise SystemExit(50 + len(noted))

    assert Run(answer).end()[0] == 51


def test_afterwards_all_is_as_it_was() -> None:
    before = signal.getsignal(TERM), signal.getsignal(INT)
    own = os.pipe()
    os.set_blocking(own[1], False)
    signal.set_wakeup_fd(own[1])
    try:
        noted: list[int] = []
        listener = Listener([TERM, INT], noted.append)
        listener.listen()
        assert heard() == [INT, TERM]
        os.kill(os.getpid(), TERM)
        time.sleep(APART)
        assert noted == [TERM]
        listener.close()
        listener.close()
        assert os.read(own[0], 10) == bytes([TERM]), "whoever listened before hears it too"
    finally:
        assert signal.set_wakeup_fd(-1) == own[1]
        os.close(own[0]), os.close(own[1])
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before
    assert heard() == []


def test_a_forked_process_is_no_run() -> None:
    """It dies of the first signal, and its signals are not this process's."""
    noted: list[int] = []
    listener = Listener([TERM], noted.append)
    listener.listen()
    try:
        child = fork(lambda: time.sleep(20))
        time.sleep(0.1)
        os.kill(child, TERM)
        assert wait(child, 5) == -TERM
        assert noted == []
        assert heard() == [TERM]
    finally:
        listener.close()


def test_workers_ignore_what_the_run_hears() -> None:
    """A terminal and torchrun send a signal to all of them; the run needs its workers to come to a boundary."""
    listener = Listener([TERM, INT], lambda number: None)
    listener.listen()
    try:
        feed = Feed(tiny.loader(50, 4, num_workers=2, persistent_workers=True))
        batches = feed.epoch(0)
        for _ in range(2):  # one of each worker: both have begun
            next(batches)
        assert feed._watch is not None
        for process in feed._watch._processes:
            os.kill(process.pid, TERM)
            os.kill(process.pid, INT)
        assert len(list(batches)) == 11
    finally:
        listener.close()

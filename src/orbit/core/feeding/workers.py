"""A DataLoader's workers, failing by name: which worker, and which sample it was at.

torch says which process died, or raises what the worker raised; the sample that did it is not named. Here every list
of indices goes to its worker with a number. Where the worker takes the list out of its queue, it notes the number on a
board in shared memory, and as the fetch walks along the list, the place in it. When a fetch fails, the board tells.

    raises      WorkerError from the worker's exception, whose message holds the worker's own traceback
    is killed   WorkerError from torch's RuntimeError; where the loop fetches, never in the middle of a step or a save
    hangs       with DataLoader(timeout=t): WorkerError within about t seconds. Without a timeout torch waits forever,
                and so does the loop

After a death or a hang the other workers are killed too: they may wait for a lock that the dead one held.

An iterable-style dataset has no indices: its worker is named alone. So it is where a subclass of DataLoader makes its
own iterator.
"""

from __future__ import annotations

import atexit
import multiprocessing
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_int64
from multiprocessing import RawArray
from multiprocessing.connection import wait
from typing import Any
from weakref import WeakSet

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

_RAISED = re.compile(r"Caught (\w+) in DataLoader worker process (\d+)")
_DIED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_HUNG = re.compile(r"DataLoader timed out after")
_TAKEN, _UNSEEN = -1, -2  # on the board: no sample begun yet; a batch that is not walked along


class WorkerError(RuntimeError):
    """A DataLoader worker raised, died or hung; torch's own error is its `__cause__`.

    Attributes:
        worker: the worker's number, None if unknown.
        batch: the sampler's item that it was at (a list of indices, or one index), None if unknown.
        sample: the index that it was at, None if unknown.
    """

    def __init__(self, message: str, worker: int | None, batch: Any, sample: Any) -> None:
        super().__init__(message)
        self.worker, self.batch, self.sample = worker, batch, sample


class _Board:
    """Shared memory: which task each worker took last, and how far along each task is."""

    def __init__(self, workers: int, tasks: int) -> None:
        self.current = RawArray(c_int64, workers)
        self.places = RawArray(c_int64, tasks)
        self.clear()

    def clear(self) -> None:
        self.current[:] = [-1] * len(self.current)

    def note(self, task: int, place: int) -> None:
        self.places[task % len(self.places)] = place

    def place(self, task: int) -> int:
        return int(self.places[task % len(self.places)])


# ── in a worker ───────────────────────────────────────────────────────────────────────────────────────────────

_board: _Board | None = None  # set in workers alone


class _Init:
    """The user's worker_init_fn, after the worker has been given its board and the signals to ignore."""

    def __init__(self, board: _Board, then: Callable[[int], None] | None) -> None:
        self.board, self.then = board, then
        self.ignored: Sequence[int] = ()

    def __call__(self, worker: int) -> None:
        global _board
        _board = self.board
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)


class _Task:
    """A sampler's item on its way to a worker, which unpickles the item itself."""

    def __init__(self, number: int, item: Any) -> None:
        self.number, self.item = number, item

    def __reduce__(self) -> Any:
        return _take, (self.number, self.item)


def _take(number: int, item: Any) -> Any:
    info = get_worker_info()
    if _board is None or info is None:
        return item
    walked = type(item) is list and not hasattr(info.dataset, "__getitems__")
    _board.note(number, _TAKEN if walked else _UNSEEN)
    _board.current[info.id] = number
    return _Walked(number, item) if walked else item


class _Walked(list[Any]):
    """A batch's indices; whoever walks along them is followed on the board."""

    def __init__(self, number: int, items: list[Any]) -> None:
        super().__init__(items)
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        assert _board is not None
        for place, index in enumerate(super().__iter__()):
            _board.note(self.number, place)
            yield index
        _board.note(self.number, len(self))


# ── in the process that trains ────────────────────────────────────────────────────────────────────────────────


class _Done:
    """torch's sign to its workers that they are done.

    A worker looks at it under a lock. One that is killed in that moment takes the lock with it, and torch would wait
    for it forever while it takes the iterator down.
    """

    def __init__(self, event: Any) -> None:
        self.event = event

    def set(self) -> None:
        self.event._cond.acquire(timeout=1)  # a living worker has it for microseconds
        self.event._cond.release()  # also in the place of a dead one
        self.event.set()

    def is_set(self) -> bool:
        return bool(self.event.is_set())


class Watch:
    """Follows the workers of `loader` and explains their failures.

    Args:
        loader: with `num_workers` > 0.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.workers, self.timeout = loader.num_workers, loader.timeout
        self.in_order = getattr(loader, "in_order", True)
        self.persistent = loader.persistent_workers
        own = type(loader)
        self.numbers = (  # torch's own iterator sends the sampler's items to its workers, one after the other
            own.__iter__ is DataLoader.__iter__
            and own._get_iterator is DataLoader._get_iterator
            and not isinstance(loader.dataset, IterableDataset)
        )
        # Tasks that can be on their way at once, and as many that have just come back.
        self._sent: list[Any] = [None] * (2 * self.workers * (loader.prefetch_factor or 2) + 1)
        self._board = _Board(self.workers, len(self._sent))
        self.worker_init_fn = _Init(self._board, loader.worker_init_fn)
        self._processes: list[Any] = []
        self._received = 0
        self._fetching = self._open = self._killed = False
        self._death: RuntimeError | None = None  # a worker died while the loop was busy elsewhere
        _watches.add(self)

    def send(self, number: int, item: Any) -> Any:
        """What the sampler hands out in place of its item number `number` of the epoch."""
        if not self.numbers:
            return item
        self._sent[number % len(self._sent)] = item
        self._board.note(number, _TAKEN)
        return _Task(number, item)

    def open(self, loader: Any, ignored: Sequence[int] = ()) -> Iterator[Any]:
        """`iter(loader)`, whose failures are explained; new workers ignore some signals."""
        self._received, self._killed, self._open = 0, False, True
        self._board.clear()
        self.worker_init_fn.ignored = ignored
        iterator = self._fetch(lambda: iter(loader))
        done = getattr(iterator, "_workers_done_event", None)
        if done is not None and not isinstance(done, _Done):
            iterator._workers_done_event = _Done(done)
        self._processes = list(getattr(iterator, "_workers", ()))
        if ignored:
            _deaf.update(process.pid for process in self._processes)
        _listen()
        return self._batches(iterator)

    def _batches(self, iterator: Iterator[Any]) -> Iterator[Any]:
        nothing = object()
        kept = [iterator]
        del iterator
        try:
            while (batch := self._fetch(lambda: next(kept[0], nothing))) is not nothing:
                self._received += 1
                yield batch
        finally:
            kept.clear()  # an exception keeps this frame
            if not self.persistent:  # the workers end with the epoch
                self._open, self._death = False, None

    def _fetch(self, call: Callable[[], Any]) -> Any:
        try:
            self._fetching = True
            if self._death is not None:
                death, self._death = self._death, None
                raise death
            return call()
        except Exception as error:
            self._fetching = False  # a death that is told from here on is held back
            self._explain(error)
            raise
        finally:
            self._fetching = False

    def holds_back(self, error: RuntimeError) -> bool:
        """A worker's death is told at the next fetch, unless the loop is fetching now or torch spoke of another's."""
        if not self._dead(error):
            return False
        if self._open and not self._killed:
            if self._fetching:
                return False
            self._death = error
        return True

    # ── what happened ─────────────────────────────────────────────────────────────────────────────────────────

    def _dead(self, error: Exception) -> list[int]:
        match = _DIED.search(str(error))
        pids = [] if match is None else [int(pid) for pid in match[1].split(",")]
        return [number for number, process in enumerate(self._processes) if process.pid in pids]

    def _explain(self, error: Exception) -> None:
        """Raise a WorkerError from `error`, if that came from a worker."""
        text = str(error)
        if (raised := _RAISED.match(text)) is not None:
            # torch's frame holds the error and the iterator in a circle; a process that is forked before they are
            # collected would shut the iterator down once more, and spoil its queues.
            traceback.clear_frames(error.__traceback__)
            raise self._error(
                int(raised[2]), self._awaited, f"raised {raised[1]}",
                "look at that sample; the worker's traceback is above",
            ) from error  # fmt: skip
        dead: list[int] = []
        if isinstance(error, RuntimeError):
            dead = self._dead(error)
        elif isinstance(error, OSError | EOFError):  # a batch whose memory went with its worker
            for sentinel in wait([process.sentinel for process in self._processes], timeout=0.5):
                next(process for process in self._processes if process.sentinel == sentinel).join(1)
            dead = [number for number, process in enumerate(self._processes) if process.exitcode]
        if dead:
            process = self._processes[dead[0]]
            process.join(1)
            code = process.exitcode
            how = f"left with exit code {code}"
            if code is not None and code < 0:
                how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
            self._kill()
            raise self._error(
                dead[0], self._board.current[dead[0]], f"(pid {process.pid}) {how}",
                "a process that takes too much memory is killed so: try fewer workers, a smaller prefetch_factor or "
                "smaller samples; num_workers=0 shows an error that kills the worker",
            ) from error  # fmt: skip
        if isinstance(error, RuntimeError) and _HUNG.match(text):
            self._kill()
            task = self._awaited
            raise self._error(
                None if task is None else task % self.workers,  # they take turns
                task, f"gave nothing for {self.timeout:g} s",
                "look at that sample, or give the DataLoader a longer timeout=",
            ) from error  # fmt: skip

    def give_up(self) -> None:
        """Workers are about to be killed: their deaths are no news."""
        self._killed = True

    def _kill(self) -> None:
        self.give_up()
        for process in self._processes:
            process.kill()
            process.join(1)  # so that its end is told while this watch knows of it
        self._death = None

    @property
    def _awaited(self) -> int | None:
        """The task whose batch is fetched now."""
        return self._received if self.numbers and self.in_order else None

    def _error(self, worker: int | None, task: int | None, what: str, way_out: str) -> WorkerError:
        who = f"DataLoader worker {'?' if worker is None else worker} of {self.workers}"
        batch = sample = None
        if not self.numbers or task is None or task < 0:
            where = "at a sample that is not known (it has no index, or batches come out of order)"
        else:
            batch, place = self._sent[task % len(self._sent)], self._board.place(task)
            if task < self._received:
                batch, where = None, "between two batches"
            elif not isinstance(batch, list):
                sample, where = batch, f"at sample {batch!r}"
            elif 0 <= place < len(batch):
                sample, where = (
                    batch[place],
                    f"at sample {batch[place]!r}, number {place + 1} of its batch {_short(batch)}",
                )
            else:
                doing = "putting together (collate_fn)" if place == len(batch) else "fetching"
                where = f"{doing} batch {_short(batch)}"
        return WorkerError(f"{who} {what} {where}: {way_out}", worker, batch, sample)


def end_all() -> None:
    """Kill the daemonic child processes, workers of any loader among them: the process is about to end."""
    for watch in list(_watches):
        watch.give_up()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@atexit.register
def _end_deaf() -> None:
    """multiprocessing would send those that are left a SIGTERM, which they ignore, and wait for them."""
    for child in multiprocessing.active_children():
        if child.pid in _deaf:
            child.kill()


_watches: WeakSet[Watch] = WeakSet()
_deaf: set[int | None] = set()  # numbers of worker processes that ignore signals
_below: Any = None  # torch's handler of SIGCHLD, once ours stands before it
_listening = False


def _listen() -> None:
    """Stand before torch's handler, which raises at whatever line the main thread is at."""
    global _below, _listening
    main = threading.current_thread() is threading.main_thread()
    if not _listening and main and hasattr(signal, "SIGCHLD"):
        _listening = True
        _below = signal.signal(signal.SIGCHLD, _on_child)


def _on_child(number: int, frame: Any) -> None:
    try:
        if callable(_below):
            _below(number, frame)
    except RuntimeError as error:
        if not any([watch.holds_back(error) for watch in _watches]):
            raise


def _short(batch: list[Any]) -> str:
    return repr(batch) if len(batch) <= 16 else f"[{', '.join(map(repr, batch[:16]))}, … {len(batch)} in all]"

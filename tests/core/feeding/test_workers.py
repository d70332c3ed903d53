"""Workers that raise, die or hang are named with their sample, where the loop fetches and nowhere else."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from orbit.core import Feed, WorkerError
from orbit.core.feeding import workers

SAMPLES, BAD = 40, 13


@pytest.fixture(autouse=True)
def no_iterator_stays() -> Iterator[None]:
    """pytest.raises makes a circle of frames; a worker forked from here would shut an old iterator in it down again."""
    yield
    gc.collect()


class Faulty(Dataset[Any]):
    """Sample 13 is `fault`."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == BAD:
            if self.fault == "raises":
                raise KeyError("no such file")
            if self.fault == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "leaves":
                os._exit(3)
            if self.fault == "hangs":
                time.sleep(1000)
        return torch.tensor(index)


class Together(Faulty):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert type(indices) is list
        return [self[index] for index in indices]


def broken_collate(batch: list[torch.Tensor]) -> torch.Tensor:
    if any(sample == BAD for sample in batch):
        raise ValueError("samples of many sizes")
    return torch.stack(batch)


def failure(loader: Any, told: str) -> WorkerError:
    with pytest.raises(WorkerError, match=told) as caught:
        for _ in Feed(loader).epoch(0):
            pass
    return caught.value


def loader(fault: str, **options: Any) -> DataLoader[Any]:
    options = {"batch_size": 4, "num_workers": 2, "timeout": 0.5 if fault == "hangs" else 0} | options
    return DataLoader(options.pop("dataset", Faulty(fault)), **options)


@pytest.mark.parametrize(
    ("fault", "persistent", "told"),
    [
        ("raises", False, "raised KeyError"),
        ("is killed", False, r"\(pid \d+\) was killed by signal 9 \(Killed\)"),
        ("is killed", True, r"\(pid \d+\) was killed by signal 9 \(Killed\)"),
        ("leaves", False, r"\(pid \d+\) left with exit code 3"),
        ("hangs", False, "gave nothing for 0.5 s"),
        ("hangs", True, "gave nothing for 0.5 s"),
    ],
)
def test_the_error_names_worker_and_sample(fault: str, persistent: bool, told: str) -> None:
    """Batches [0 … 3], [4 … 7], … go to workers 0, 1, 0, 1: sample 13 lies in worker 1's second."""
    began = time.monotonic()
    told = rf"DataLoader worker 1 of 2 {told} at sample 13, number 2 of its batch \[12, 13, 14, 15\]: "
    error = failure(loader(fault, persistent_workers=persistent), told)
    assert time.monotonic() - began < 1.5, "within a second of the timeout"
    assert (error.worker, error.sample, error.batch) == (1, 13, [12, 13, 14, 15])
    if fault == "raises":
        assert isinstance(error.__cause__, KeyError)
        assert 'raise KeyError("no such file")' in str(error.__cause__), "the worker's own traceback"
    else:
        assert isinstance(error.__cause__, RuntimeError)


def test_in_a_shuffled_and_resumed_epoch_the_indices_are_the_samplers() -> None:
    def shuffled(fault: str) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(4)
        return loader(fault, sampler=torch.utils.data.RandomSampler(range(SAMPLES), generator=generator))

    at = list(shuffled("fine").sampler).index(BAD) // 4
    assert at > 1
    feed = Feed(shuffled("fine"))
    batches = feed.epoch(0)
    next(batches)
    position = feed.position()
    batches.close()  # type: ignore[attr-defined]
    again = Feed(shuffled("raises"))
    with pytest.raises(WorkerError, match="at sample 13") as caught:
        list(again.epoch(0, position))
    assert BAD in caught.value.batch
    assert again.cursor == at


@pytest.mark.parametrize(
    ("options", "where", "sample"),
    [
        ({"batch_size": None}, "at sample 13:", 13),
        ({"dataset": Together("raises")}, r"fetching batch \[12, 13, 14, 15\]:", None),
        ({"dataset": Faulty("fine"), "collate_fn": broken_collate}, r"putting together \(collate_fn\) batch \[1", None),
        ({"batch_size": 20}, r"at sample 13, .* \[0, 1, .* 15, … 20 in all\]", 13),
        ({"in_order": False}, "at a sample that is not known", None),
        ({"batch_size": 1, "batch_sampler": [(12, 13)]}, r"at sample \(12, 13\)", (12, 13)),
    ],
)  # fmt: skip
def test_what_is_known_is_said(options: dict[str, Any], where: str, sample: Any) -> None:
    assert failure(loader("raises", **options), where).sample == sample


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        yield from range(5)
        raise OSError("the stream broke off")


def test_the_worker_of_a_stream_is_named_alone() -> None:
    told = "worker 0 of 1 raised OSError at a sample that is not known"
    error = failure(DataLoader(Stream(), batch_size=2, num_workers=1), told)
    assert isinstance(error.__cause__, OSError)


def test_a_worker_that_cannot_start_is_named_with_its_first_batch() -> None:
    def start(worker: int) -> None:
        if worker == 1:
            raise FileNotFoundError("no data here")

    failure(loader("fine", worker_init_fn=start), r"1 of 2 raised FileNotFoundError fetching batch \[4, 5")


def test_errors_of_the_loop_s_own_process_stay_as_they_are() -> None:
    with pytest.raises(KeyError, match="no such file"):
        list(Feed(loader("raises", num_workers=0)).epoch(0))

    def indices() -> Iterator[list[int]]:
        yield [0]
        raise LookupError("in the sampler")

    class Sampler(list[Any]):
        __iter__ = lambda self: indices()  # noqa: E731

    with pytest.raises(LookupError, match="in the sampler"):
        list(Feed(loader("fine", batch_size=1, batch_sampler=Sampler([1, 2]))).epoch(0))


@pytest.mark.parametrize("lost", [EOFError(), ConnectionResetError("by peer")])
def test_a_batch_that_went_with_its_worker_is_told_as_the_death(lost: Exception) -> None:
    """torch reads a batch's memory through its worker; what it meets there comes before it knows of the death."""
    feed = Feed(loader("fine", timeout=5))
    batches = feed.epoch(0)
    next(batches)
    watch = feed._watch
    assert watch is not None

    def meet() -> None:
        watch._processes[1].kill()
        raise lost

    with pytest.raises(WorkerError, match="worker 1 of 2 .* was killed by signal 9") as caught:
        watch._fetch(meet)
    assert caught.value.__cause__ is lost
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_dies_while_the_loop_is_busy_is_told_of_at_the_next_fetch(persistent: bool) -> None:
    """torch alone raises at whatever line is running: in a backward, an optimizer step, a save."""
    feed = Feed(loader("fine", persistent_workers=persistent))
    batches = feed.epoch(0)
    next(batches)
    assert feed._watch is not None
    for process in feed._watch._processes:
        process.kill()
    torch.ones(3).sum()
    time.sleep(0.2)  # where torch would raise
    with pytest.raises(WorkerError, match="was killed by signal 9"):
        next(batches)


def test_a_death_after_the_last_batch_harms_nobody() -> None:
    feed = Feed(loader("fine"))
    assert len(list(feed.epoch(0))) == 10
    processes = feed._watch._processes if feed._watch is not None else []
    assert [process.exitcode for process in processes] == [0, 0]
    batches = feed.epoch(1)
    next(batches)
    batches.close()  # left early: its workers end with it
    assert len(list(feed.epoch(2))) == 10


def test_a_death_that_is_not_ours_is_raised_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_another_loader(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")

    feed = Feed(loader("fine"))
    batches = feed.epoch(0)
    next(batches)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="pid 1"):
        patch.setattr(workers, "_below", of_another_loader)
        workers._on_child(signal.SIGCHLD, None)
    assert len(list(batches)) == 9


def test_a_lock_that_died_with_a_worker_holds_nobody_up() -> None:
    batches = workers.Watch(loader := DataLoader(list(range(8)), num_workers=1)).open(loader)
    next(batches)
    iterator = batches.gi_frame.f_locals["kept"][0]  # type: ignore[attr-defined]
    iterator._workers_done_event.event._cond.acquire()  # as a worker leaves it that is killed while it looks
    began = time.monotonic()
    del iterator
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 4

"""How the demo chooses its threads, on a clock that stands for a machine alone or shared."""

import pytest
import torch

from orbit.demo import threads


class Clock:
    """A perf_counter by which each matrix product takes `cost[threads]` seconds."""

    def __init__(self, monkeypatch, cost):
        self.now, self.count, self.cost = 0.0, 1, cost
        monkeypatch.setattr(torch, "set_num_threads", self.set)
        monkeypatch.setattr(threads.time, "perf_counter", self.read)

    def set(self, count):
        self.count = count

    def read(self):
        self.now += self.cost[self.count]
        return self.now


@pytest.mark.parametrize(
    ("cost", "wanted"), [({1: 1.0, 2: 0.6}, 2), ({1: 1.0, 2: 9.0}, 1)], ids=["alone", "shared"]
)
def test_what_is_faster_at_the_moment(monkeypatch, cost, wanted):
    clock = Clock(monkeypatch, cost)
    assert threads.pick_threads(2) == wanted == clock.count


def test_one_lucky_turn_does_not_count(monkeypatch):
    turns = iter([1.0, 0.1, 1.0, 9.0, 1.0, 9.0])  # seconds with 1, 2, 1, 2, 1, 2 threads
    clock = Clock(monkeypatch, {})
    readings = iter([value for took in turns for value in (0.0, took)])
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(readings))
    assert threads.pick_threads(2) == 1 == clock.count


def test_with_one_thread_there_is_nothing_to_choose(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: pytest.fail("nothing was to be changed"))
    assert threads.pick_threads(1) == 1


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="in the block"), threads.threads_restored() as found:
        assert found == before
        torch.set_num_threads(before + 1)
        raise RuntimeError("in the block")
    assert torch.get_num_threads() == before

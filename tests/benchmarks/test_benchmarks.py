"""The benchmark does what it says: same work for all, and a clock that counts what it should."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import check_same_work, measure, paired, report_overhead, report_steps, verdict
from benchmarks.contenders import OURS, RIVALS, bare
from benchmarks.workload import Job, Workload, one_parameter

PACKAGES = {
    "accelerate": "accelerate",
    "transformers.Trainer": "transformers",
    "Lightning Trainer": "lightning",
}
SMALL = Workload("one parameter", one_parameter, (1, 1), steps=12, warmup=2)


@pytest.mark.filterwarnings("ignore")  # rivals warn about worker counts and their own deprecations
@pytest.mark.parametrize("name", [*OURS, *RIVALS])
def test_every_contender_does_the_bare_loops_work(name: str):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    job, reference = SMALL.job(), SMALL.job()
    start = [p.detach().clone() for p in job.model.parameters()]
    {**OURS, **RIVALS}[name](job)
    bare(reference)
    check_same_work(name, job, reference)
    assert not torch.equal(start[0], next(job.model.parameters()))
    assert job.batches.seconds_per_step > 0


def test_other_work_is_noticed():
    job, reference = SMALL.job(), SMALL.job()
    bare(reference)
    job.scheduler.base_lrs = [1e-4]
    bare(job)
    with pytest.raises(AssertionError, match="cheat did other work than the bare loop: weight differs"):
        check_same_work("cheat", job, reference)
    with pytest.raises(AssertionError, match="lazy stopped after 0 of 12 batches"):
        check_same_work("lazy", SMALL.job(), reference)


def test_the_clock_counts_what_a_loop_does_between_batches():
    def slow(job: Job) -> None:
        time.sleep(0.1)  # start-up: not counted
        job.optimizer.register_step_pre_hook(lambda *_: time.sleep(0.01))
        bare(job)

    times = measure(replace(SMALL, steps=8), {"bare loop": bare, "orbit Engine": slow, "accelerate": slow}, 2)
    over, ratio = paired(times, "orbit Engine")
    assert 0.009 < over < 0.03
    assert ratio > 2
    text = report_overhead(times)
    assert "orbit Engine's overhead over accelerate's" in text
    assert "MISSED" in text
    assert "MISSED" in report_steps(times)


def test_a_missing_package_takes_out_one_contender_aloud(capsys: pytest.CaptureFixture[str]):
    def absent(job: Job) -> None:
        raise ModuleNotFoundError("No module named 'absent'")

    times = measure(SMALL, {"bare loop": bare, "absent": absent}, 1)
    assert list(times) == ["bare loop"]
    assert "left out: absent (No module named 'absent')" in capsys.readouterr().err


def test_a_verdict_allows_for_noise():
    assert verdict("a", 1.01, 1.02).endswith("kept")
    assert verdict("a", 1.05, 1.02, noise=0.01).endswith("MISSED")
    assert verdict("a", 1.05, 1.02, noise=0.04).endswith("undecided, too noisy here")

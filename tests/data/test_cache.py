"""Samples from files are the samples themselves; a folder is whole or not there, and made by one process."""

import json
import multiprocessing
import pickle
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from orbit.data.cache import Tokenised, tokenised
from orbit.data.fingerprint import NotCacheableError
from orbit.data.rows import DataError


class Data:
    """Of every form that a sample may have; counts how often it is read."""

    truncated = 0

    def __init__(self, count=5):
        self.samples, self.read = [self.sample(i) for i in range(count)], 0

    def sample(self, i):
        ids = torch.arange(i % 3 * 2) + i
        return {
            "chosen": {"input_ids": ids + 70_000, "labels": torch.where(ids > 3, ids, -100)},
            "rejected": {"input_ids": ids[:1], "mask": ids[:1] > 2, "weight": ids.double() / 3},
            0: {"input_ids": torch.arange(i + 1)},
            "index": torch.tensor(i),
            "good": torch.tensor(i % 2 == 0),
            "task": None if i == 1 else f"té{i}",
            "score": i / 3,
        }

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        self.read += 1
        return self.samples[i]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def ordered(sample):
    """Tensors first, as files give them."""
    return {
        key: ordered(sample[key]) if isinstance(sample[key], dict) else sample[key]
        for key in sorted(sample, key=str)
    }


def test_samples_are_what_they_were_and_are_made_once(tmp_path):
    data = Data()
    made, again = tokenised(data, "k", tmp_path), tokenised(data, "k", tmp_path)
    assert data.read == len(data) + 1
    for found in (made, again, pickle.loads(pickle.dumps(made))):
        assert len(found) == 5
        for i in range(5):
            assert same(ordered(found[i]), ordered(data.samples[i]))
        assert same(found[-1]["index"], torch.tensor(4))
        with pytest.raises(IndexError):
            found[5]
        assert found.lengths.tolist() == [max(i % 3 * 2, i + 1) for i in range(5)]
    assert len(pickle.dumps(made)) < 500
    made[0]["index"] += 1
    made[2]["chosen"]["input_ids"].zero_()
    assert same(ordered(made[2]), ordered(data.samples[2]))


def test_another_key_is_another_folder(tmp_path):
    assert len(tokenised(Data(5), "a", tmp_path)) == 5
    assert len(tokenised(Data(3), "b", tmp_path)) == 3


def test_workers_read_the_files(tmp_path):
    data = tokenised(Data(), "k", tmp_path)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [int(sample["index"]) for sample in loader] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("harm", ["flip", "cut", "meta", "gone"])
def test_a_damaged_folder_is_made_again(tmp_path, harm, caplog):
    data = Data()
    tokenised(data, "k", tmp_path)
    name = "meta.json" if harm == "meta" else "0.bin"
    path = tmp_path / "k" / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[5] ^= 1
    path.write_bytes(content if harm == "flip" else content[:-7])
    if harm == "gone":
        path.unlink()
    with pytest.raises(DataError, match="is damaged"):
        Tokenised(tmp_path / "k")
    found = tokenised(data, "k", tmp_path)
    assert all(same(ordered(found[i]), ordered(data.samples[i])) for i in range(5))
    assert "is damaged" in caplog.text
    assert data.read == 12


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"task": [1]}, "sample 3, 'task', is .1.: samples hold"),
        ({"more": 1}, "sample 3 has .*more.* and sample 0"),
        ({"index": torch.tensor(2.0)}, "sample 3, 'index', is tensor"),
        ({"index": torch.tensor([2])}, "sample 3, 'index', is tensor"),
        ({"index": torch.tensor(2**40)}, "beyond 32 bits"),
    ],
)
def test_samples_that_no_file_can_hold_leave_nothing_behind(tmp_path, change, why):
    data = Data()
    data.samples[3] = {**data.samples[3], **change}
    with pytest.raises(NotCacheableError, match=why):
        tokenised(data, "k", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]


def test_what_the_dataset_raises_passes_and_leaves_nothing_behind(tmp_path):
    class Broken(Data):
        def __getitem__(self, i):
            if i == 2:
                raise KeyError("row 2")
            return super().__getitem__(i)

    with pytest.raises(KeyError, match="row 2"):
        tokenised(Broken(), "k", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["k.lock"]
    assert len(tokenised(Data(), "k", tmp_path)) == 5


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="ORBIT_CACHE"):
        tokenised(Data(), "k", tmp_path / "file" / "cache")


def test_what_a_killed_process_left_goes(tmp_path):
    stray = tmp_path / "k.999999999-0.tmp"
    stray.mkdir()
    other = tmp_path / "other.999999999-0.tmp"
    other.mkdir()
    tokenised(Data(), "k", tmp_path)
    assert not stray.exists()
    assert other.exists()  # perhaps of a process on another machine


def test_cut_samples_are_told_at_every_start(tmp_path):
    data = Data()
    data.truncated = 2
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 of 5 samples were cut"):
            assert tokenised(data, "k", tmp_path).truncated == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenised(Data(), "other", tmp_path).truncated == 0


class Slow(Data):
    def __getitem__(self, i):
        time.sleep(0.02)
        return super().__getitem__(i)


def _make(folder, queue):
    data = Slow()
    found = tokenised(data, "k", folder)
    queue.put((data.read, [int(found[i]["index"]) for i in range(len(found))]))


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_of_two_at_once_one_makes_and_the_other_waits(tmp_path, kind):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    start = context.Process if kind == "processes" else threading.Thread
    both = [start(target=_make, args=(tmp_path, queue)) for _ in range(2)]
    for one in both:
        one.start()
    found = [queue.get(timeout=30) for _ in both]
    for one in both:
        one.join()
    assert sorted(read for read, _ in found) == [0, 6]
    assert all(indices == [0, 1, 2, 3, 4] for _, indices in found)


def test_empty_tensors(tmp_path):
    found = tokenised([{"input_ids": torch.arange(0)}] * 2, "k", tmp_path)
    assert found.lengths.tolist() == [0, 0]
    assert same(found[1], {"input_ids": torch.arange(0)})
    assert json.loads((tmp_path / "k" / "meta.json").read_text())["count"] == 2
    assert np.array_equal(found.lengths, [0, 0])

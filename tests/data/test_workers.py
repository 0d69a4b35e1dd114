"""Loader processes: a process that dies or stalls is replaced, and at most the file that caused it is set aside."""

import multiprocessing
import os
import signal
import time
from itertools import islice

import pytest
import torch

from stdit.data.workers import WorkerPool

KEYS = [[2 * i, 2 * i + 1] for i in range(8)]


class Numbers:
    """A sample of key k reads the file "k", or "k-other" if "k" is set aside. `fault(file)` is called before each read."""

    def __init__(self, fault=None):
        self.fault = fault

    def load(self, key, set_aside, reading):
        file = f"{key}-other" if str(key) in set_aside else str(key)
        reading(file)
        if self.fault is not None:
            self.fault(file)
        return {"key": key, "file": file, "value": torch.full((3,), key, dtype=torch.bfloat16)}


def die_at_five(file):
    if file == "5":
        os.kill(os.getpid(), signal.SIGSEGV)


def stall_at_five(file):
    while file == "5":
        time.sleep(0.1)


def refuse_five(file):
    if file == "5":
        raise ValueError("five is refused")


class DieOnce:
    """Ends the process at file 5 unless a marker file exists, and writes the marker."""

    def __init__(self, marker):
        self.marker = marker

    def __call__(self, file):
        if file == "5" and not os.path.exists(self.marker):
            open(self.marker, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)


def files(samples, timeout=60.0, workers=2):
    """The files of all samples in order, and the files that are set aside."""
    set_aside: dict[str, str] = {}
    pool = WorkerPool(samples, workers, timeout, set_aside)
    found = [sample for group in pool.batches(iter(KEYS)) for sample in group]
    assert [sample["key"] for sample in found] == list(range(16))
    assert all((sample["value"] == sample["key"]).all() for sample in found)
    assert not multiprocessing.active_children()
    return [sample["file"] for sample in found], set_aside


def test_a_file_that_ends_two_fresh_processes_is_set_aside_and_no_other():
    found, set_aside = files(Numbers(die_at_five))
    assert found == [f"{i}-other" if i == 5 else str(i) for i in range(16)]
    assert list(set_aside) == ["5"] and "SIGSEGV" in set_aside["5"]


class Gone(Numbers):
    def __setstate__(self, state):
        raise ValueError("the table is gone; start the run again")


def test_what_keeps_samples_from_a_process_is_said_also_to_whoever_asks_late():
    pool = WorkerPool(Gone(), 2, 60.0, {})
    groups = pool.batches(iter(KEYS))
    deadline = time.monotonic() + 60
    while pool._failure is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    with pytest.raises(ValueError, match="^the table is gone; start the run again$"):
        next(groups)


class Counted(Numbers):
    """Samples with what only a process that is being started can be given."""

    def __init__(self):
        super().__init__()
        self.count = multiprocessing.get_context("spawn").Value("i", 0)

    def load(self, key, set_aside, reading):
        with self.count.get_lock():
            self.count.value += 1
        return super().load(key, set_aside, reading)


def test_samples_may_have_locks_and_shared_values():
    samples = Counted()
    files(samples)
    assert samples.count.value == 16


def test_a_file_whose_reading_stalls_is_set_aside_after_the_timeout():
    found, set_aside = files(Numbers(stall_at_five), timeout=0.5)
    assert found == [f"{i}-other" if i == 5 else str(i) for i in range(16)]
    assert "data.timeout=0.5" in set_aside["5"]


def test_a_process_killed_once_is_replaced_and_reads_the_same_file_again(tmp_path):
    assert files(Numbers(DieOnce(str(tmp_path / "marker")))) == ([str(i) for i in range(16)], {})


def test_an_error_of_the_data_reaches_the_caller():
    with pytest.raises(ValueError, match="five is refused"):
        files(Numbers(refuse_five))
    assert not multiprocessing.active_children()


def test_signals_to_the_whole_group_do_not_end_loader_processes():
    pool = WorkerPool(Numbers(), 1, 60.0, {})
    stream = pool.batches(iter(KEYS))
    first = next(stream)
    process = multiprocessing.active_children()[0]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(process.pid, number)
    assert [s["key"] for group in [first, *islice(stream, 7)] for s in group] == list(range(16))
    assert process.is_alive()
    stream.close()
    assert not process.is_alive()

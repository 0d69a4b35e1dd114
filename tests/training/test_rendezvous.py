"""How the processes of a start find each other in a store that an earlier start has used."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch.distributed as dist

from stdit.training.rendezvous import fresh_store

# As torchrun does: one store for all starts of two processes, which are killed before the next.
SCRIPT = """
import multiprocessing, os, time
import torch, torch.distributed as dist
from stdit.recipes.build import build_accelerator

def work(rank, late):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True")
    if rank == late:
        time.sleep(1)
    build_accelerator("fp32", timeout=10)
    total = torch.ones(1)
    dist.all_reduce(total)
    os.write(1, f"{total.item():g} processes\\n".encode())
    reached.wait()
    time.sleep(100)

fork = multiprocessing.get_context("fork")
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
for late in (None, 1, 0):
    reached = fork.Barrier(3)
    workers = [fork.Process(target=work, args=(rank, late)) for rank in range(2)]
    for one in workers:
        one.start()
    try:
        reached.wait(20)
    finally:
        for one in workers:
            one.kill()
"""


def test_processes_that_are_started_again_connect_to_each_other_and_not_to_those_before(tmp_path):
    (tmp_path / "starts.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "starts.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["2 processes"] * 6, done.stderr[-3000:]


def test_every_start_has_an_empty_part_of_the_store_in_whatever_order_its_processes_come():
    store = dist.HashStore()
    for order in permutations(range(3)):

        def starts(rank, order=order):
            time.sleep(0.03 * order.index(rank))
            part = fresh_store(store, rank, 3, 5)
            there = part.check([f"key {rank}"])
            part.set(f"key {rank}", "")
            part.wait([f"key {other}" for other in range(3)])
            return there

        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(starts, range(3))) == [False] * 3


def test_processes_that_do_not_start_are_named_even_if_they_did_so_before():
    store = dist.HashStore()
    other = threading.Thread(target=fresh_store, args=(store, 1, 2, 5))
    other.start()
    fresh_store(store, 0, 2, 5)
    other.join()
    with pytest.raises(ValueError, match=r"^of 7 processes, 1, 2, 3, 4 and 2 more did not start within 0.1 s"):
        fresh_store(store, 0, 7, 0.1)
    with pytest.raises(ValueError, match=r"^of 7 processes, 0 did not start within 0.1 s \(train.parallel.timeout\)"):
        fresh_store(store, 1, 7, 0.1)

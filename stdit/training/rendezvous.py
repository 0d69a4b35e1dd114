"""How the processes of one start find each other in torchrun's store, which still has the keys of earlier starts.

torchrun keeps one store for all its starts (https://github.com/pytorch/pytorch/issues/135712), and torch writes the same keys
in each. A process that is faster than another reads the address of that one's predecessor. With gloo it is then refused, or both
processes wait for the other to connect, for five times the timeout.
"""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

FRESH = "stdit-fresh://"  # `init_method` of process groups: env:// in a part of the store that is empty
_SHOWN = 4  # processes in a line
_PAUSE = 0.02  # seconds


def fresh_store(store: dist.Store, rank: int, processes: int, seconds: float) -> dist.Store:
    """A part of a store that the processes of this start share, and that no earlier start has written to.

    Every process writes a word of its own, which the first one answers with the name of the part. Words of earlier starts are
    answered as well, but nobody reads that. Counting starts (TORCHELASTIC_RESTART_COUNT) would not do: the launchers of several
    nodes count differently. All processes must call it; ValueError if one of them has not done so after so many seconds.
    """
    try:
        return _fresh_store(store, rank, processes, seconds)
    except dist.DistNetworkError as error:
        raise ValueError(
            f"process {rank} has lost the store by which processes find each other ({str(error).splitlines()[0]}); look at what process 0 "
            "and torchrun print, and run the same command again."
        ) from error


def _fresh_store(store: dist.Store, rank: int, processes: int, seconds: float) -> dist.Store:
    name = os.urandom(8).hex()
    if rank:
        store.set(f"stdit/start/{rank}", name)
        try:
            store.wait([f"stdit/answer/{name}"], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise _late([0], processes, seconds) from error
        name = store.get(f"stdit/answer/{name}").decode()
        store.set(f"stdit/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + seconds
    late = list(range(1, processes))
    while late:
        for other in late:
            if store.check([f"stdit/start/{other}"]):
                store.set(f"stdit/answer/{store.get(f'stdit/start/{other}').decode()}", name)
        time.sleep(_PAUSE)
        late = [other for other in late if not store.check([f"stdit/{name}/{other}"])]
        if late and time.monotonic() > deadline:
            raise _late(late, processes, seconds)
    return dist.PrefixStore(name, store)


def _late(late: list[int], processes: int, seconds: float) -> ValueError:
    who = ", ".join(map(str, late[:_SHOWN])) + (f" and {len(late) - _SHOWN} more" if len(late) > _SHOWN else "")
    return ValueError(
        f"of {processes} processes, {who} did not start within {seconds:g} s (train.parallel.timeout); look at what they print, "
        "and run the same command again."
    )


def _handler(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[dist.Store, int, int]]:
    for store, rank, processes in rendezvous(urlparse(url)._replace(scheme="env").geturl(), timeout=timeout, **options):
        yield fresh_store(store, rank, processes, timeout.total_seconds()), rank, processes


register_rendezvous_handler(urlparse(FRESH).scheme, _handler)

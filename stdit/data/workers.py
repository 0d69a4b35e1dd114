"""Loader processes that are replaced when they die or stall, so that one bad file or one kill does not end a run.

torch's DataLoader notices a dead worker but cannot go on without it. Samples come back through pipes and not through shared
memory, which is small in containers and left behind by killed processes.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from io import BytesIO
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from stdit.data import stores

SET_ASIDE = "is set aside:"  # in the reason of a file that crashed or stalled processes
# The number of new processes that a file may crash or stall before it is set aside.
FRESH_TRIES = 2
# Processes in a row that end before they read a file, which is due to the machine (memory, imports), not to a file.
MAX_FAILED_STARTS = 3


def num_workers(asked: int | None, decodes: bool, processes: int = 1) -> int:
    """The number of processes that load the data of one of `processes` training processes on this machine.

    asked: the number in the config, or None for one less than the cores, at most 8. decodes: whether samples are decoded;
    if not, there are no processes, since sending a sample takes longer than reading it.
    """
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1)) if decodes else 0


class Loadable(Protocol):
    """The interface of samples that processes load by key, without the files in `set_aside` (name -> reason)."""

    def load(self, key: Any, set_aside: dict[str, str], reading: Callable[[str], None]) -> Any:
        """Load the sample of a key; `reading(name)` is called before each file that is opened."""


class _Job(NamedTuple):
    number: int
    key: Any


class _Worker:
    """A loader process, its job, the file that it reads, and the time of its last message."""

    def __init__(self, samples: Loadable, memory: float | None):
        context = multiprocessing.get_context("spawn")  # a live decoder does not survive fork
        self.connection, theirs = context.Pipe()
        arguments = (theirs, _Carried(samples), stores.allowed(), memory)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.job: _Job | None = None
        self.since = 0.0  # time of the last message
        self.file: str | None = None
        self.jobs_done = 0
        self.ready = False

    def give(self, job: _Job, set_aside: dict[str, str]) -> None:
        """Send a job to the process."""
        self.job, self.file, self.since = job, None, time.monotonic()
        with contextlib.suppress(OSError):  # it has died, which the next read of its connection shows
            self.connection.send((job.key, set_aside))

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkerPool:
    """Samples that `workers` processes load, in the order of their keys.

    timeout: seconds after which a file that is still being read has stalled. set_aside: name -> reason of files that
    crashed or stalled their process, and then two new ones; it grows while the pool runs. Its files are never opened.
    memory: bytes that a process may take beyond those it begins with, where the system can limit them; None: no limit.
    """

    def __init__(
        self,
        samples: Loadable,
        workers: int,
        timeout: float,
        set_aside: dict[str, str],
        *,
        memory: float | None = None,
    ):
        self.samples, self.timeout, self.set_aside, self.memory = samples, timeout, set_aside, memory
        self._lock = threading.Condition()
        self._waiting: list[_Job] = []  # not assigned to a process yet, by number
        self._done: dict[int, Any] = {}
        self._failure: Exception | None = None
        self._failed_fresh: dict[str, int] = {}
        self._failed_starts = 0
        self._closed = False
        self._wake, self._woken = multiprocessing.get_context("spawn").Pipe()
        self._workers = [_Worker(samples, memory) for _ in range(workers)]
        self._thread = threading.Thread(target=self._run, name="stdit-loader", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before multiprocessing waits for its children, which ignore its signal

    def batches(self, keys: Iterator[Sequence[Any]]) -> Generator[list[Any], None, None]:
        """Yield the samples of each group of keys, in order, while the next groups are loaded."""
        groups: list[range] = []
        number = 0
        ahead = 2 * len(self._workers)
        try:
            while True:
                while not groups or len(groups) < 3 or number - groups[0].start < len(groups[0]) + ahead:
                    group = next(keys, None)
                    if group is None:
                        break
                    groups.append(range(number, number + len(group)))
                    with self._lock:
                        self._waiting += [_Job(number + i, key) for i, key in enumerate(group)]
                    number += len(group)
                    self._wake.send(None)
                if not groups:
                    return
                yield [self._take(n) for n in groups.pop(0)]
        finally:
            self.close()

    def _take(self, number: int) -> Any:
        with self._lock:
            self._lock.wait_for(lambda: number in self._done or self._failure is not None)
            if number in self._done:
                return self._done.pop(number)
            assert self._failure is not None
            raise self._failure

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [pid for worker in self._workers if (pid := worker.process.pid) is not None]

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            self._wake.send(None)
            self._thread.join()
            atexit.unregister(self.close)

    def _run(self) -> None:
        """The thread that assigns jobs, receives results and replaces processes."""
        try:
            while not self._closed and self._failure is None:
                self._hand_out()
                busy = [w for w in self._workers if w.job is not None and w.ready]
                deadline = min((w.since + self.timeout for w in busy), default=None)
                patience = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = wait([self._woken, *(w.connection for w in self._workers)], patience)
                if self._woken in ready:
                    self._woken.recv()
                for worker in list(self._workers):
                    if worker.connection in ready:
                        self._receive(worker)
                    elif worker.job and worker.ready and time.monotonic() - worker.since > self.timeout:
                        self._replace(worker, f"took more than data.timeout={self.timeout:g} seconds")
        except Exception as error:
            self._fail(error)
        finally:
            for worker in self._workers:
                worker.end()

    def _hand_out(self) -> None:
        for worker in self._workers:
            with self._lock:
                if worker.job is not None or not self._waiting:
                    continue
                job = self._waiting.pop(0)
            worker.give(job, self.set_aside)

    def _receive(self, worker: _Worker) -> None:
        try:
            kind, value = ForkingPickler.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            worker.process.join(5)
            self._replace(worker, _death(worker.process.exitcode))
            return
        worker.since, worker.ready = time.monotonic(), True
        if kind == "reading":
            worker.file = value
        elif kind == "error":
            self._fail(value)
        elif kind == "sample":
            assert worker.job is not None
            self._failed_starts = 0
            with self._lock:
                self._done[worker.job.number] = value
                self._lock.notify_all()
            self._failed_fresh.pop(worker.file or "", None)
            worker.job, worker.file = None, None
            worker.jobs_done += 1

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Replace a process that died or stalled by a new one, which repeats its job."""
        if worker.file is None and not worker.jobs_done:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise ValueError(
                    f"a loader process {reason} before it read a file, {self._failed_starts} times in a row; lower "
                    "data.workers (each needs memory of its own), or load in the main process with data.workers=0."
                )
        if worker.file is not None and not worker.jobs_done:
            tries = self._failed_fresh[worker.file] = self._failed_fresh.get(worker.file, 0) + 1
            if tries >= FRESH_TRIES:
                self.set_aside[worker.file] = f"{worker.file!r} {SET_ASIDE} {tries} loader processes in a row {reason}"
        worker.end()
        fresh = _Worker(self.samples, self.memory)
        self._workers[self._workers.index(worker)] = fresh
        if worker.job is not None:
            fresh.give(worker.job, self.set_aside)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error  # others may follow from the first
            self._lock.notify_all()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        hint = " (often: out of memory)" if -code == getattr(signal, "SIGKILL", 9) else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"


def _limit_memory(memory: float) -> None:
    """Limit the memory of this process to `memory` bytes beyond what it has; nothing where the system has no such limit."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no limits, macOS does not keep this one
        import resource

        with open("/proc/self/statm") as stream:
            limit = int(stream.read().split()[0]) * resource.getpagesize() + int(memory)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


class _Carried:
    """Samples that arrive in a loader process as bytes, which it unpickles once it may read stores and can say what went wrong.

    They are pickled within Process.start(), so that locks and shared memory are sent as always.
    """

    def __init__(self, samples: Loadable):
        self.samples = samples

    def __reduce__(self) -> tuple[type[bytearray], tuple[bytes]]:
        buffer = BytesIO()
        ForkingPickler(buffer).dump(self.samples)
        return bytearray, (buffer.getvalue(),)


def _work(connection: Connection, pickled: bytearray, allowed: list[str], memory: float | None) -> None:
    """The main function of a loader process: load a sample for each key that arrives, until the connection closes."""
    stores.allow(*allowed)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the main process handles signals to all
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Without the line of code, which is one of multiprocessing's and not the user's.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    torch.set_num_threads(1)  # many processes must not compete for the cores
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()

    def send(kind: str, value: Any) -> None:
        connection.send_bytes(_pickled((kind, value)))

    def send_error(error: Exception) -> None:
        send("error", error if isinstance(error, (ValueError, OSError, MemoryError)) else _with_trace(error))

    try:
        samples: Loadable = ForkingPickler.loads(pickled)
    except Exception as error:
        return send_error(error)
    pickled.clear()  # the process keeps its arguments
    if memory is not None:
        _limit_memory(memory)
    send("ready", None)
    while True:
        try:
            key, set_aside = connection.recv()
        except EOFError:
            return
        try:
            sample = samples.load(key, set_aside, lambda name: send("reading", name))
        except Exception as error:
            send_error(error)
        else:
            send("sample", sample)


def _with_trace(error: Exception) -> RuntimeError:
    import traceback

    return RuntimeError("".join(traceback.format_exception(error)))


def _pickled(value: Any) -> memoryview:
    buffer = BytesIO()
    _ByValue(buffer, 5).dump(value)
    return buffer.getbuffer()


class _ByValue(ForkingPickler):
    """Pickles tensors as bytes; torch would send a file descriptor, which is closed when the process dies."""

    def reducer_override(self, value: Any) -> Any:
        """Reduce tensors to bytes, shape and type, and everything else as usual."""
        if isinstance(value, Tensor):
            flat = value.detach().contiguous().flatten().view(torch.uint8)
            return _tensor, (flat.numpy(), value.dtype, tuple(value.shape))
        return NotImplemented


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(dtype).reshape(shape)

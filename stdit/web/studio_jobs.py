"""The queue of the studio: one request at a time in the worker, with progress, time left, and an end within one step."""

import asyncio
import secrets
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stdit.web.server import Worker
from stdit.web.studio_problems import Refused, said_of

WAITING = 16  # requests that may wait
_REMEMBERED = 40  # finished ones, for tabs that come back
_TOLD_EVERY = 0.1  # seconds


class Cancelled(Exception):
    """The request was cancelled."""


class Progress:
    """How far nested loops are: a function that wraps the loops of sampling (`SamplingOptions.progress`).

    tell: called with the share that is done, and the loop as (done, of) if it is an innermost one. stop: ends the loops by
    Cancelled.
    """

    def __init__(self, tell: Callable[[float, tuple[int, int] | None], Any], stop: threading.Event):
        self._tell, self._stop = tell, stop
        self._loops: list[list[int]] = []
        self._outer = -1  # the depth of the innermost loop that had loops inside it

    def __call__(self, iterable: Iterable, total: int | None = None, **_: Any) -> Iterator[Any]:
        """Yield what a loop goes over, and count it."""
        depth, count = len(self._loops), len(iterable) if total is None else total  # type: ignore[arg-type]
        self._outer = depth - 1
        self._loops.append([0, max(1, count)])
        try:
            for one in iterable:
                self.check()
                yield one
                del self._loops[depth + 1 :]
                self._loops[depth][0] += 1
                self._tell(self.share, None if depth <= self._outer else (self._loops[depth][0], count))
        finally:
            del self._loops[depth:]

    @property
    def share(self) -> float:
        """The share of everything that is done, 0 to 1."""
        inner = 0.0
        for done, count in reversed(self._loops):
            inner = min(1.0, (done + inner) / count)
        return inner

    def check(self, *_: Any) -> None:
        """Raise Cancelled if that was asked for; takes any arguments, so that it can be a hook of the model."""
        if self._stop.is_set():
            raise Cancelled


@dataclass
class Job:
    """A request on its way. state: waiting, running, done, failed or cancelled. versions: what it made."""

    request: dict[str, Any]
    commands: list[list[str]]
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    state: str = "waiting"
    share: float = 0.0
    step: tuple[int, int] = (0, 0)
    left: float | None = None
    seconds: float = 0.0
    problem: dict[str, Any] | None = None
    versions: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    stepped: float | None = None  # when the first step began

    def as_json(self) -> dict[str, Any]:
        """As a page gets it."""
        left = None if self.left is None else round(self.left, 1)
        return {
            "id": self.id, "state": self.state, "request": self.request, "commands": self.commands, "share": round(self.share, 4),
            "step": list(self.step), "left": left, "seconds": round(self.seconds, 2), "problem": self.problem, "versions": self.versions,
        }  # fmt: skip


class Jobs:
    """The queue. run: does a job in the worker -> the names of what it made. tell: called with a job that changed."""

    def __init__(self, worker: Worker, run: Callable[[Job, Progress], list[str]], tell: Callable[[Job], None]):
        self.worker, self._run, self._tell = worker, run, tell
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task] = set()

    def listing(self) -> list[dict[str, Any]]:
        """All jobs that are remembered, the oldest first."""
        return [job.as_json() for job in self._jobs.values()]

    def add(self, job: Job) -> None:
        """Queue a job; Refused if too many wait."""
        if sum(one.state in ("waiting", "running") for one in self._jobs.values()) > WAITING:
            raise Refused(f"{WAITING} requests are waiting; let some of them end, or cancel them.")
        self._jobs[job.id] = job
        for old in [one.id for one in self._jobs.values() if one.state not in ("waiting", "running")][:-_REMEMBERED]:
            del self._jobs[old]
        task = asyncio.get_running_loop().create_task(self._do(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._tell(job)

    def cancel(self, name: str) -> None:
        """End a job: before it begins, or within one step. Refused if there is none of that name."""
        if name not in self._jobs:
            raise Refused("there is no such request; it ended before the server was started again.")
        job = self._jobs[name]
        job.stop.set()
        if job.state == "waiting":
            job.state = "cancelled"
            self._tell(job)

    def close(self) -> None:
        """Cancel everything, since the server stops."""
        for job in self._jobs.values():
            job.stop.set()

    async def _do(self, job: Job) -> None:
        try:
            await self.worker.run(self._work, job, asyncio.get_running_loop())
        finally:
            self._tell(job)

    def _work(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """Do a job in the worker, and note how it ends; nothing is raised, since nobody waits for it."""
        if job.stop.is_set():
            return
        began, job.state = time.monotonic(), "running"
        told = 0.0
        loop.call_soon_threadsafe(self._tell, job)

        def tell(share: float, step: tuple[int, int] | None) -> None:
            nonlocal told
            now = time.monotonic()
            job.share, job.step, job.seconds = share, step or job.step, now - began
            job.stepped = job.stepped or began
            if share > 0:
                job.left = (now - job.stepped) * (1 - share) / share
            if now - told > _TOLD_EVERY:
                told = now
                loop.call_soon_threadsafe(self._tell, job)

        try:
            job.versions = self._run(job, Progress(tell, job.stop))
            job.state, job.share, job.left = "done", 1.0, 0.0
        except Cancelled:
            job.state = "cancelled"
        except Refused as error:
            job.state, job.problem = "failed", error.problem.as_json()
        except (ValueError, OSError) as error:
            job.state, job.problem = "failed", Refused(said_of(error)).problem.as_json()
        except Exception as error:  # of any kind: the queue goes on
            traceback.print_exc()
            said = " ".join(str(error).split())[:200]
            failed = Refused(f"the program failed ({type(error).__name__}: {said}); see the terminal.")
            job.state, job.problem = "failed", failed.problem.as_json()
        job.seconds = time.monotonic() - began

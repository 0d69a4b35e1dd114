"""Which process the others of a run wait for: each says where it is, and those that wait name the ones that are behind.

A collective operation that fails after its timeout does not say who was missing. So every process keeps its place in the store
of the run (torch's TCPStore, by a connection of its own), whatever its main thread is doing.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch.distributed as dist
from accelerate.utils import broadcast_object_list

import stdit
from stdit.progress import Progress

_SHOWN = 4  # processes in a line
_PACKAGE = str(Path(stdit.__file__).parent)


class Place(NamedTuple):
    """Where a process is: `turn` numbers what it does for a step. since: on its own clock."""

    step: int
    turn: int
    doing: str
    since: float


class Beat(NamedTuple):
    """What a process says of itself. number: grows with time. seconds: since it came to its place. line: of its code."""

    number: int
    step: int
    turn: int
    doing: str
    seconds: float
    host: str
    pid: int
    line: str

    @property
    def order(self) -> tuple[int, int]:
        """What compares the places of two processes."""
        return self.step, self.turn


class Heartbeats:
    """A context manager in which the processes of a run say where they are; all must enter it.

    timeout: seconds after which the run gives a process up. One that has stayed at its place for half of them prints a line that
    names the processes that are behind it: their number, host and step, what they do, and where in the code.
    """

    def __init__(self, process: int, processes: int, timeout: float):
        self.process, self.processes, self.timeout = process, processes, timeout
        self._interval = min(10.0, timeout / 20)
        self._place = Place(0, 0, "starting", time.monotonic())
        self._first_look: tuple[Place, dict[int, Beat | None]] | None = None
        self._line: tuple[Place, str] | None = None
        self._beats = 0
        self._stop = threading.Event()
        self._store: dist.Store | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeats":
        if self.processes > 1 and (store := _connect()) is not None:
            self._store, self._main = store, threading.get_ident()
            self._tell(self._place)
            self._thread = threading.Thread(target=self._run, name="stdit-heartbeats", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a thread within torch when Python ends would abort the process
        if isinstance(error, RuntimeError) and (named := self.named) is not None:  # a collective operation gave up
            raise ValueError(f"{named} It was given up; run the same command again to resume.") from error

    def mark(self, step: int, doing: str) -> None:
        """Say what this process does next. All processes must do the same in a step, in the same order."""
        turn = self._place.turn + 1 if self._place.step == step else 0
        self._place = Place(step, turn, doing, time.monotonic())

    @property
    def named(self) -> str | None:
        """The line that names the processes that this one still waits for."""
        return self._line[1] if self._line is not None and self._line[0] is self._place else None

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            place = self._place
            try:
                self._tell(place)
                if time.monotonic() - place.since > self.timeout / 2 and self.named is None:
                    self._look(place)
            except RuntimeError as error:  # the store is gone, and with it the first process
                if time.monotonic() - place.since > self.timeout / 2 and self.named is None:
                    self._say(
                        place, f"the first process of the run does not answer ({' '.join(str(error).split())[:120]})."
                    )

    def _tell(self, place: Place) -> None:
        assert self._store is not None
        self._beats += 1
        seconds = time.monotonic() - place.since
        beat = Beat(
            self._beats, place.step, place.turn, place.doing, seconds=round(seconds, 1), host=socket.gethostname(),
            pid=os.getpid(), line=self._line_of_code() if seconds > self.timeout / 4 else "",
        )  # fmt: skip
        self._store.set(str(self.process), json.dumps(beat))

    def _line_of_code(self) -> str:
        """The line of this package at which the main thread is."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        return "" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_lineno}"

    def _look(self, place: Place) -> None:
        """Look where the others are, and again three beats later, since one that is lost says nothing new."""
        found = self._read()
        if self._first_look is None or self._first_look[0] is not place:
            self._first_look = (place, found)
            return
        earlier = self._first_look[1]
        mine = found[self.process]
        assert mine is not None
        if mine.number - self._beat_of(earlier[self.process]) < 3:
            return
        order = (place.step, place.turn)
        others = {process: beat for process, beat in found.items() if process != self.process}
        if any(beat is not None and beat.order > order for beat in others.values()):
            return  # it is this process that the others wait for
        lost = {p for p, beat in others.items() if beat is not None and beat.number == self._beat_of(earlier[p])}
        late = {p: beat for p, beat in others.items() if beat is None or beat.order < order or p in lost}
        if late:
            self._say(place, f"{_described(late, lost)}; process {self.process} has waited for {mine.seconds:.0f} s.")
        elif self.process == 0:
            self._say(
                place,
                f"all {self.processes} processes have been at step {place.step} ({place.doing}) for {mine.seconds:.0f} s, and none is "
                "behind the others: a device or the network hangs.",
            )

    def _say(self, place: Place, line: str) -> None:
        self._line = (place, f"{line[0].upper()}{line[1:]}")
        Progress.write(
            f"{self._line[1]} It is given up after {self.timeout:g} s (train.parallel.timeout).", file=sys.stderr
        )

    def _read(self) -> dict[int, Beat | None]:
        """What each process has said last; None if it has not begun."""
        assert self._store is not None
        keys = [str(process) for process in range(self.processes)]
        # At once if all have begun; the store would wait for a key that is missing.
        there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        said = dict(zip(there, self._store.multi_get(there), strict=True))
        return {int(key): Beat(*json.loads(said[key])) if key in said else None for key in keys}

    @staticmethod
    def _beat_of(beat: Beat | None) -> int:
        return 0 if beat is None else beat.number


def _described(late: Mapping[int, Beat | None], lost: set[int]) -> str:
    """Processes, where they are and since when."""
    said = []
    for process, beat in list(late.items())[:_SHOWN]:
        if beat is None:
            said.append(f"process {process} has not begun to train")
            continue
        who = f"process {process} (pid {beat.pid} on {beat.host})"
        where = f"at step {beat.step}, {beat.doing}" + (f" at {beat.line}" if beat.line else "")
        if process in lost:
            said.append(f"{who} does not answer, and was {where}")
        else:
            said.append(f"{who} has been {where}, for {beat.seconds:.0f} s")
    further = [f"{len(late) - _SHOWN} further ones are behind"] if len(late) > _SHOWN else []
    return "; ".join([*said, *further])


def _connect() -> dist.Store | None:
    """A connection of its own to the store of the run, under a prefix that no earlier start of the run has used."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:  # started in another way than by environment variables
        return None
    prefix = [os.urandom(8).hex()]
    broadcast_object_list(prefix)
    try:
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    except (RuntimeError, ValueError):  # nothing listens there: the run was started in another way
        return None
    return dist.PrefixStore(f"stdit/{prefix[0]}", store)

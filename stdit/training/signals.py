"""What ends a run, a signal or the death of its launcher: the step that is being taken is finished and saved first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# From a user, a scheduler (SLURM sends USR1), a closed terminal.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
_PARENT = os.getppid()  # early, since a launcher may die while the run is built


def _after_fork() -> None:
    global _PARENT
    _PARENT = os.getppid()


if hasattr(os, "register_at_fork"):  # a launcher may have imported this module, and fork its workers
    os.register_at_fork(after_in_child=_after_fork)


class Stopped(Exception):
    """Raised after the run was stopped, and its state saved; `code` is the exit code to use."""

    def __init__(self, code: int, step: int):
        super().__init__(f"stopped at step {step}, and saved; run the same command again to resume")
        self.code = code


class Interrupted(BaseException):
    """Raised by the signal handler in a wait that a signal ends.

    No Exception, as KeyboardInterrupt is none: what reads a file turns every Exception into that of a damaged file.
    """


class StopSignals:
    """A context manager that records signals. says_so: whether this process writes a line for the first one."""

    def __init__(self, says_so: bool):
        self.says_so = says_so
        self.number: int | None = None
        self._waiting = False
        # Of torchrun, also by accelerate launch. A single run that is started from within a worker is none of its workers if
        # it was given an environment without RANK.
        self._has_launcher = {"TORCHELASTIC_RUN_ID", "RANK"} <= os.environ.keys()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # handlers can be set there only
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether the run must stop: after a signal, and when the launcher is gone, which would not end it any more."""
        if self._has_launcher and os.getppid() != _PARENT:
            self._has_launcher = False
            self.number = self.number or signal.SIGTERM
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with suppress(OSError):  # what reads the output may be gone as well
                    os.write(2, b"\nthe launcher of this process is gone: the run stops and is saved after this step\n")
        return self.number is not None

    @property
    def code(self) -> int:
        """The exit code of a process that the signal ended; that of SIGTERM if another process was asked to stop."""
        return 128 + self.number if self.number else 143

    @contextmanager
    def ending_waits(self) -> Iterator[None]:
        """A context manager in which a signal raises `Interrupted`, also one that came before."""
        self._waiting = True
        try:
            if self.number is not None:
                raise Interrupted
            yield
            if self.number is not None:  # what was waited for has caught the exception, and may be wrong
                raise Interrupted
        finally:
            self._waiting = False

    def _on_signal(self, number: int, _: Any) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        if self.says_so:
            name = signal.Signals(number).name
            said = f"\n{name}: the run stops and is saved after this step; a second {name} ends it at once, unsaved\n"
            os.write(2, said.encode())  # print is not safe in a handler that interrupts another print
        if self._waiting:
            self._waiting = False
            raise Interrupted

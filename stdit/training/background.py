"""Files that training does not wait for: drawings and clips, which a thread writes one after another."""

import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from stdit.progress import Progress

_WAITING = 4


def reason_of(error: BaseException) -> str:
    """An error in one line, for a run that goes on."""
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__)


class BackgroundWriter:
    """Calls functions in a thread, in the order in which they were given, of which at most `_WAITING` are kept.

    A further one waits for the oldest, since each may hold clips.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stdit-writer")
        self._waiting: deque[Future] = deque()

    @property
    def is_busy(self) -> bool:
        """Whether a function is still to be called, or has not returned."""
        return any(not one.done() for one in self._waiting)

    def run(self, what: str, write: Callable[[], None]) -> None:
        """Call a function later; if it fails, that is said on stderr, and the run goes on. what: its name in that line."""

        def guarded() -> None:
            try:
                write()
            except Exception as error:
                Progress.write(f"{what} failed ({reason_of(error)}); training goes on.", file=sys.stderr)

        while len(self._waiting) >= _WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(guarded))

    def close(self) -> None:
        """Wait until all functions have returned."""
        self._pool.shutdown(wait=True)

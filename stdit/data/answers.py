"""Answers of stores: waited for no longer than a user allows, and the status and reason in what clients raise."""

import atexit
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

# As clients write what a store answers; other numbers may be part of a file's name.
_STATUS = re.compile(r"\bstatus(?: code)?:? (40[134])\b|(?:^|: )(40[134])\b")
T = TypeVar("T")


def timeout() -> float:
    """The seconds in which a store must answer: $STDIT_STORE_TIMEOUT, or 30."""
    given = os.environ.get("STDIT_STORE_TIMEOUT", "30")
    try:
        seconds = float(given)
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"STDIT_STORE_TIMEOUT={given!r} is no number of seconds; set one above 0, or unset it.")


def status_in(error: BaseException | None) -> int | None:
    """The HTTP status that an error of a client keeps as a number."""
    values = (getattr(error, "status", None), getattr(getattr(error, "response", None), "status_code", None))
    return next((value for value in values if isinstance(value, int)), None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error, None if it has none."""
    if (status := status_in(error)) is not None:
        return status
    name = type(error).__name__
    if isinstance(error, PermissionError) or "Permission" in name or "Forbidden" in name:
        return 403
    if "Unauthenticated" in name or "Unauthorized" in name or "NoCredentials" in name:
        return 401
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def first_line(error: BaseException) -> str:
    """The reason in an error of a client: the status that a store answers, else its first line."""
    text = " ".join(str(error).split("\n")[0].split())
    if answered := re.search(r"\bstatus(?: code)?:? (\d{3}(?: [A-Za-z][A-Za-z' -]*)?)", text):
        return f"it answers {answered[1].strip()}"
    text = re.split(r" in [0-9.]+(?:ns|µs|ms|s) - ", text)[-1]  # after the request and its time
    return text if len(text) <= 160 else f"...{text[-160:]}"  # causes come last


class LateError(TimeoutError):
    """A store has not answered in time."""


class _Asking(threading.Thread):
    """A thread that asks a store. answered: when the store answered last, in part."""

    answered = 0.0


def answered_in_part() -> None:
    """Note that a store has answered in part, so that the rest gets the same time again."""
    thread = threading.current_thread()
    if isinstance(thread, _Asking):
        thread.answered = time.monotonic()


# Threads that ask a store. One that is in a library's own code aborts a process that ends before it comes back.
_asking: set[threading.Thread] = set()
_ends = threading.Event()
_AT_EXIT = 2.0  # seconds that the end of a process waits for them


@atexit.register
def _await_answers() -> None:
    _ends.set()
    until = time.monotonic() + _AT_EXIT
    while _asking and time.monotonic() < until:
        time.sleep(0.01)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; LateError if it takes longer, whatever a library does to wait for ever.

    A call that is answered in parts may take that long for each.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((True, call()))
        except BaseException as error:
            done.append((False, error))
        finally:
            _asking.discard(threading.current_thread())

    if _ends.is_set():
        raise TimeoutError("the program ends")
    thread = _Asking(target=run, daemon=True)  # a process ends although it waits
    thread.answered = time.monotonic()
    _asking.add(thread)
    thread.start()
    while thread.is_alive() and (left := thread.answered + seconds + 1 - time.monotonic()) > 0:
        thread.join(left)  # libraries that keep the time themselves say more
    if not done:
        raise LateError
    good, value = done[0]
    if good:
        return value
    if time.monotonic() - thread.answered >= seconds and isinstance(value, Exception) and status_of(value) is None:
        raise LateError from value
    raise value

"""The C library's allocator, set for training on a CPU."""

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_MMAP_THRESHOLD = 32 << 20  # bytes, the most that glibc takes


def reuse_freed_memory() -> bool:
    """Keep memory that tensors free for the next ones, instead of returning it to the system; whether this was done.

    By default glibc returns megabytes at every `free` and gets them back by page faults, which takes 6 % of a step of
    the quickstart (`stdit bench floor`). Does nothing without glibc, or where the user's environment sets the allocator.
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD) and mallopt(TRIM_THRESHOLD, 2**31 - 1))

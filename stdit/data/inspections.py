"""Files inspected in full, by processes that are replaced when one dies, with a report from which a stopped run goes on."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from stdit.data.config import DataConfig
from stdit.data.facts import Facts
from stdit.data.identity import content_of
from stdit.data.inspect import inspect
from stdit.data.media import state_of
from stdit.data.workers import SET_ASIDE, WorkerPool, num_workers
from stdit.progress import Progress

# What an entry says of a file that was read, besides path, bytes, modified and seconds.
MEASURED = Facts._fields
# Entries of earlier versions do not have all of it.
_NEEDED = tuple(name for name in MEASURED if name not in Facts._field_defaults)


class _Files:
    """The files to read, as the loader's processes load them: by number, each to an entry of the report."""

    def __init__(self, paths: list[Path], backend: str, memory: float):
        self.paths, self.config = paths, DataConfig(num_frames=1, height=1, width=1, backend=backend)  # type: ignore[arg-type]
        self.memory = memory

    def load(self, key: int, set_aside: Mapping[str, str], reading: Callable[[str], None]) -> dict[str, Any]:
        """Read a file in full -> its entry; a file that crashed or stalled a process is refused."""
        path, began = self.paths[key], time.perf_counter()
        entry: dict[str, Any] = {"path": str(path), **_state(path)}
        aside = set_aside.get(str(path))
        if aside is not None:
            reason = aside.removeprefix(repr(str(path))).strip()
            return {**entry, "refused": reason.replace("data.timeout", "--timeout")}
        reading(str(path))
        try:
            found = inspect(path, self.config, decode=True)
        except MemoryError:
            return {**entry, "refused": _too_large(self.memory)}
        if found.facts is None:
            entry["refused"] = found.refused
        else:
            entry |= found.facts._asdict()
        return {**entry, "seconds": round(time.perf_counter() - began, 2)}


_TOO_LARGE = "takes more memory to be read in full than"


def _too_large(memory: float) -> str:
    """The reason of a file for which the memory does not suffice."""
    return f"{_TOO_LARGE} {f'--memory={memory:g} GB' if memory else 'this machine has'}"


def _state(path: Path) -> dict[str, int]:
    size, modified = state_of(path)
    return {} if size < 0 else {"bytes": size, "modified": modified}


def read_report(path: Path | None) -> dict[str, dict[str, Any]]:
    """The entries of an earlier report by path; ValueError if the file is something else."""
    if path is None or not path.is_file():
        return {}
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            if "refused" in entry or all(name in entry for name in _NEEDED):
                entries[entry["path"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):  # also a line that was not written to its end
            continue
    if not entries and path.stat().st_size:
        raise ValueError(f"{path} exists and is no report; choose another --report, or remove it.")
    return entries


def inspect_each(
    paths: list[Path], backend: str, workers: int, timeout: float, *, memory: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Read files in full, in `workers` processes that are replaced when one dies -> an entry for each, in order.

    memory: GB that reading a file may take in such a process, 0 without a limit.
    """
    files = _Files(paths, backend, memory if workers else 0.0)
    if not workers:
        yield from (files.load(i, {}, lambda name: None) for i in range(len(paths)))
        return
    pool = WorkerPool(files, workers, timeout, {}, memory=memory * 1e9 or None)
    with closing(pool.batches(iter([[i] for i in range(len(paths))]))) as groups:
        for (entry,) in groups:
            yield entry


def inspect_all(
    paths: Sequence[Path],
    report: Path | None,
    *,
    backend: str,
    workers: int | None,
    timeout: float,
    memory: float,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The entry of every file: a known one if the file is as it was, else by reading it, added to the report at once.

    report: a file of entries, which are known, but for those of files that took more than another `memory` (GB, 0 without a
    limit), or that ended or stalled their process. known: further entries, by path.
    """
    if not memory >= 0:
        raise ValueError(f"--memory={memory:g} is no number of GB; give one of 0 or more, 0 without a limit.")
    entries = {**(known or {}), **read_report(report)}
    current = {str(path): _current(entries.get(str(path)), path, memory) for path in paths}
    entries |= {name: entry for name, entry in current.items() if entry is not None}
    missing = [path for path in paths if current[str(path)] is None]
    if len(missing) < len(paths):
        print(f"{len(paths) - len(missing)} files were read before, and have not changed")
    if workers is None:  # a process takes seconds to start
        workers = min(len(missing), max(1, min(num_workers(None, True), len(missing) // 32)))
    stream = open(report, "a", encoding="utf-8") if report else None  # noqa: SIM115 (closed below)
    if stream is not None and stream.tell():
        stream.write("\n")  # the last line may have been cut
    try:
        for entry in Progress(
            inspect_each(missing, backend, workers, timeout, memory=memory),
            total=len(missing),
            unit="file",
            disable=None,
        ):
            entries[entry["path"]] = entry
            if stream is not None:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
    finally:
        if stream is not None:
            stream.close()
    return [entries[str(path)] for path in paths]


def _current(entry: dict[str, Any] | None, path: Path, memory: float) -> dict[str, Any] | None:
    """An entry with the state of its file, which is as it was, by its content if that was hashed; None for another file.

    None also for a file whose reading ended or stalled its process, or took too much of another memory: the machine may have been
    the reason, and it is tried again.
    """
    reason = "" if entry is None else entry.get("refused", "")
    if (
        entry is None
        or reason.startswith(SET_ASIDE)
        or (reason.startswith(_TOO_LARGE) and reason != _too_large(memory))
    ):
        return None
    state = _state(path)
    if {key: entry[key] for key in ("bytes", "modified") if key in entry} == state:
        return entry
    same = "content" in entry and entry["bytes"] == state.get("bytes") and entry["content"] == content_of(path)
    return {**entry, **state} if same else None

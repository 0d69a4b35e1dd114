"""Checkpoints of a sharded model: every process writes what it holds, while training goes on, and the main process the manifest.

What they write is read by `shard_files`.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stdit.training.parallel import is_writer, local, rows_of
from stdit.training.shard_files import ROWS, check_finite
from stdit.training.state import _hash_and_sync, free_space_error, publish

_POLL = 0.05  # seconds


class ShardWriter:
    """Writes the checkpoints of one of several processes in the background, one at a time.

    All processes write into one folder, which they must share. The checkpoint appears under its name when the files of all
    are complete and on disk; whatever ends the run before that leaves the older ones whole.
    """

    def __init__(self, folder: Path, process: int, processes: int, keep: int, timeout: float):
        self.folder, self.process, self.processes = Path(folder), process, processes
        self.keep, self.timeout = keep, timeout
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any]) -> None:
        """Copy what this process holds, and begin to write it; waits for the checkpoint before. All processes must call it."""
        self._agree(lambda: self._ready(step, tensors))
        main = self.process == 0
        copies: dict[str, dict[str, Tensor]] = {}
        rows: dict[str, dict[str, int]] = {}
        for name, group in tensors.items():
            kept = {key: value for key, value in group.items() if is_writer(value, main)}
            copies[name] = {key: local(value).cpu().contiguous().clone() for key, value in kept.items()}
            rows[name] = {key: found[0] for key, value in kept.items() if (found := rows_of(value)) is not None}
        tmp = self.folder / f".tmp-{step}-shards"
        if main:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        dist.barrier()
        self._agree(lambda: self._check_visible(tmp))
        arguments = (step, tmp, copies, rows, dict(info) if main else None)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=False)
        self._thread.start()

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete. All processes must call it, and all raise an error of one."""
        self._agree(self._wait)

    def _agree(self, check: Callable[[], None]) -> None:
        """Raise in every process what a check raises in one, which would otherwise leave the others waiting."""
        problem, own = None, None
        try:
            check()
        except Exception as error:
            problem, own = str(error) or type(error).__name__, error
        found = next((one for one in gather_object([problem]) if one), None)
        if found is not None:
            raise ValueError(found) from own

    def _ready(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._wait()
        here = {name: {key: local(value) for key, value in group.items()} for name, group in tensors.items()}
        check_finite(
            here,
            f"the state after step {step}",
            "nothing was written; resume from the last checkpoint with a lower train.lr, or with train.precision=fp32",
        )

    def _check_visible(self, tmp: Path) -> None:
        if not tmp.is_dir():
            raise ValueError(
                f"process {self.process} does not see {tmp}, which the main process has made: all nodes need one folder of "
                "checkpoints; start the run in a folder that they share."
            )

    def _wait(self) -> None:
        """Wait until the checkpoint that is being written is complete; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, tmp: Path, copies: dict, rows: dict, info: dict | None) -> None:
        try:
            described = {}
            for group, tensors in copies.items():
                file = tmp / f"{group}-{self.process + 1:05d}-of-{self.processes:05d}.safetensors"
                save_file(tensors, file, metadata={ROWS: json.dumps(rows[group])})
                described[file.name] = {"sha256": _hash_and_sync(file), "bytes": file.stat().st_size}
            _write_json(tmp / f".{self.process}.json", described)
            if info is not None:
                publish(self.folder, tmp, step, info, described=self._of_all(tmp), keep=self.keep)
        except Exception as error:
            size = sum(value.nbytes for group in copies.values() for value in group.values())
            full = isinstance(error, OSError | SafetensorError)
            self._error = free_space_error(self.folder, step, size, error) if full else error
            with suppress(OSError):
                said = str(self._error) or type(self._error).__name__
                _write_json(tmp / f".{self.process}.json", {"error": said})

    def _of_all(self, tmp: Path) -> dict[str, dict]:
        """What the processes have written, once all have."""
        began = time.monotonic()
        described: dict[str, dict] = {}
        for process in range(self.processes):
            file = tmp / f".{process}.json"
            while not file.is_file():
                if time.monotonic() - began > self.timeout:
                    raise TimeoutError(
                        f"process {process} has not written its part of a checkpoint in {self.timeout:.0f} s "
                        "(train.parallel.timeout); the older checkpoints are whole"
                    )
                time.sleep(_POLL)
            found = json.loads(file.read_text())
            if "error" in found:
                raise OSError(found["error"])
            described |= found
            file.unlink()
        return described


def _write_json(path: Path, value: Any) -> None:
    tmp = path.with_suffix(".part")
    tmp.write_text(json.dumps(value))
    tmp.rename(path)

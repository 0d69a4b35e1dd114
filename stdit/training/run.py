"""The folders of a run, the lock that keeps two runs out of one folder, and the files written into it."""

import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from stdit.files import write_json, write_text

__all__ = ["RunFolders", "differences", "write_text"]


class RunFolders:
    """output/NAME, checkpoints/NAME, models/NAME below the current folder."""

    def __init__(self, name: str):
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"name={name!r} is not a folder name; use letters, digits, '-' and '_'.")
        self.name = name
        self.output, self.checkpoints, self.model = (Path(kind) / name for kind in ("output", "checkpoints", "models"))
        self.samples = self.output / "samples"
        self._lock: IO | None = None

    def lock(self) -> None:
        """Make the folders and lock them. ValueError if they cannot be written or another run has locked them."""
        try:
            for folder in (self.samples, self.checkpoints, self.model.parent):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            lock = open(self.output / ".lock", "a+")  # noqa: SIM115 (open as long as the run lasts)
        except OSError as error:
            raise ValueError(
                f"{error.filename!r} cannot be written ({error.strerror}); free it, or start from another folder."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ValueError(
                f"output/{self.name} is in use by {holder}; wait for it, or choose another name=."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        self._lock = lock

    def unlock(self) -> None:
        """Let other runs use the folders."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: Any) -> None:
        """Write the config of the run to config.yaml."""
        write_text(self.output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))

    def write_summary(self, summary: Mapping) -> None:
        """Write how the run went to summary.json."""
        write_json(self.output / "summary.json", summary)


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """Keys whose values differ, as "train.lr: 0.0001 -> 0.0002"."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found

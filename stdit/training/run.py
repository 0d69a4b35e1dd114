"""The folders of a run, the lock that keeps two runs out of one folder, and the files written into it."""

import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from stdit.files import check_name, write_json, write_text

__all__ = ["RunFolders", "differences", "write_text"]


class RunFolders:
    """The folders of a run: output/NAME, checkpoints/NAME and models/NAME in the current folder."""

    def __init__(self, name: str):
        self.name = check_name(name)
        self.output, self.checkpoints, self.model = (Path(kind) / name for kind in ("output", "checkpoints", "models"))
        self.samples = self.output / "samples"
        self._lock = FileLock(self.output / ".lock")

    def lock(self) -> None:
        """Create the folders and lock them. ValueError if they cannot be written or another run has locked them."""
        try:
            for folder in (self.samples, self.checkpoints, self.model.parent):
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / f".probe-{os.getpid()}"
                probe.touch()
                probe.unlink()
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"output/{self.name} is in use by {self._holder()}; wait for it, or choose another name=."
            ) from error
        except OSError as error:
            raise ValueError(
                f"{error.filename!r} cannot be written ({error.strerror}); make it writable, or start from another folder."
            ) from error
        write_text(self._holder_file, f"process {os.getpid()} on {socket.gethostname()}\n")
        self._clear()

    def check_own_model(self) -> None:
        """Raise ValueError if models/NAME holds a model that no run of this name wrote, which training would replace."""
        if (
            self.model.exists()
            and not (self.output / "config.yaml").is_file()
            and not any(self.checkpoints.glob("step-*"))
        ):
            raise ValueError(
                f"{self.model} holds a model that no run of this name wrote, and training would replace it; choose another "
                "name=, or move it."
            )

    def unlock(self) -> None:
        """Let other runs use the folders."""
        self._holder_file.unlink(missing_ok=True)
        self._lock.release()

    @property
    def _holder_file(self) -> Path:
        # Not the lock file itself, which some systems do not let other processes read.
        return self.output / "running.txt"

    def _holder(self) -> str:
        try:
            return self._holder_file.read_text().strip() or "another process"
        except OSError:
            return "another process"

    def _clear(self) -> None:
        """Remove temporary files of killed processes, and restore a model that was moved aside before its replacement."""
        name = re.escape(self.name)
        for before in _matching(self.model.parent, rf"\.{name}-before-\d+"):
            if not self.model.exists():
                os.rename(before, self.model)
        left = _matching(self.model.parent, rf"\.{name}-(before-)?\d+|\.\d+-{name}")
        for path in [*left, *_matching(self.output, r"\.\d+-.+"), *_matching(self.samples, r"\.\d+-.+")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def archive(self) -> list[Path]:
        """Move the files of an earlier run of this name to NAME.before-N -> the new folders."""
        moved = []
        for folder in (self.output, self.checkpoints, self.model):
            entries = [path for path in folder.glob("*") if path.name not in (".lock", self._holder_file.name)]
            if any(path.is_file() or any(path.iterdir()) for path in entries):
                target = self.new_archive(folder)
                for path in entries:
                    os.rename(path, target / path.name)
                moved.append(target)
        self.samples.mkdir(exist_ok=True)
        if self.model.is_dir() and not any(self.model.iterdir()):
            self.model.rmdir()
        return moved

    def new_archive(self, folder: Path) -> Path:
        """Create the first folder FOLDER.before-N that does not exist yet."""
        number = 1
        while (archive := folder.with_name(f"{folder.name}.before-{number}")).exists():
            number += 1
        archive.mkdir()
        return archive

    def write_config(self, config: Any) -> None:
        """Write the config of the run to config.yaml."""
        write_text(self.output / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))

    def write_summary(self, summary: Mapping) -> None:
        """Write the summary of the run to summary.json."""
        write_json(self.output / "summary.json", summary)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The entries of a folder whose whole name matches a regular expression."""
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[str]:
    """List the keys whose values differ, such as "train.lr: 0.0001 -> 0.0002"."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {' -> '.join(_shown(old, new))}")
    return found


def _shown(old: Any, new: Any) -> tuple[str, str]:
    """Two values as text; of long lists only their lengths and where they begin to differ."""
    if not (isinstance(old, list) and isinstance(new, list)) or max(len(old), len(new)) <= 12:
        return str(old), str(new)
    first = next(
        (i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), min(len(old), len(new))
    )
    return f"{len(old)} with {old[first : first + 3]} at {first}", f"{len(new)} with {new[first : first + 3]}"

"""Training runs beside the studio: their curves as they grow, and their previews."""

import csv
import math
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stdit.files import check_name

POINTS = 600  # of a curve, at most twice as many
_COLUMNS = 12  # of a file; others are left out
_LONGEST = 4096  # bytes of a line
_BLOCK = 8 << 20  # bytes that are read at a time
_LIVE = 120.0  # seconds after which a run that writes nothing counts as stopped
METRICS = "training_metrics.csv"


class Curve:
    """The means of a training_metrics.csv over stretches of steps: read as it grows, in constant memory."""

    def __init__(self, path: Path):
        self.path = path
        self._restart()

    def _restart(self) -> None:
        self._inode, self._offset, self._width = 0, 0, 1
        self._header: list[str] = []
        self._sums: dict[int, list[list[float]]] = {}  # stretch -> for each column the sum and the number
        self.step = 0

    def update(self) -> "Curve":
        """Read what was added; from the beginning if the file was written anew."""
        state = self.path.stat()
        if state.st_ino != self._inode or state.st_size < self._offset:
            self._restart()
            self._inode = state.st_ino
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            while block := file.read(_BLOCK):
                whole = block.rfind(b"\n") + 1
                if not whole:  # a line that is being written, or none at all
                    break
                self._offset += whole
                file.seek(self._offset)
                self._add(block[:whole].decode(errors="replace").splitlines())
        return self

    def _add(self, lines: list[str]) -> None:
        for line in lines:
            if len(line) > _LONGEST or "\0" in line:
                continue
            values = next(csv.reader([line]), [])
            if not self._header:
                self._header = values[:_COLUMNS]
                continue
            row = dict(zip(self._header, values, strict=False))
            try:
                step = int(row.pop("step"))
                numbers = [float(row.get(name) or "nan") for name in self._header[1:]]
            except (KeyError, ValueError):
                continue
            self.step = max(self.step, step)
            sums = self._sums.setdefault(step // self._width, [[0.0, 0] for _ in numbers])
            for place, number in zip(sums, numbers, strict=True):
                if math.isfinite(number):
                    place[0] += number
                    place[1] += 1
            if len(self._sums) > 2 * POINTS:
                self._halve()

    def _halve(self) -> None:
        """Stretches of twice the length."""
        halved: dict[int, list[list[float]]] = {}
        for stretch, sums in self._sums.items():
            into = halved.setdefault(stretch // 2, [[0.0, 0] for _ in sums])
            for place, (total, count) in zip(into, sums, strict=True):
                place[0] += total
                place[1] += count
        self._sums, self._width = halved, 2 * self._width

    def as_json(self) -> dict[str, Any]:
        """Columns by name: steps, and means, null where there are none."""
        stretches = sorted(self._sums)
        found: dict[str, Any] = {"step": [stretch * self._width for stretch in stretches]}
        for i, name in enumerate(self._header[1:]):
            means = [self._sums[stretch][i] for stretch in stretches]
            values = [float(f"{total / count:.5g}") if count else None for total, count in means]
            if any(value is not None for value in values):
                found[name] = values
        return found


class Runs:
    """The runs that write into `output/NAME`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._curves: dict[str, Curve] = {}

    def listing(self) -> list[dict[str, Any]]:
        """The runs, those that wrote last first. live: whether one is at work now."""
        found: list[dict[str, Any]] = []
        for path in self.folder.glob(f"[!.]*/{METRICS}"):
            changed = path.stat().st_mtime
            live = time.time() - changed < _LIVE and (path.parent / "running.txt").is_file()
            found.append({"name": path.parent.name, "changed": changed, "live": live})
        return sorted(found, key=lambda run: -run["changed"])[:100]

    def run(self, name: str) -> dict[str, Any]:
        """Curves and previews of a run; ValueError if there is none of that name."""
        path = self.folder / check_name(name, "run") / METRICS
        if not path.is_file():
            self._curves.pop(name, None)
            raise ValueError(f"there is no run {name} under {self.folder}; it may have been moved.")
        if name not in self._curves and len(self._curves) > 8:
            self._curves.pop(next(iter(self._curves)))
        curve = self._curves.setdefault(name, Curve(path)).update()
        previews = sorted(picture.name for picture in path.parent.glob("samples/*.png"))
        steps = [name for name in previews if name.startswith("step-")]
        return {
            "name": name, "step": curve.step, "steps": self._planned(name), "curves": curve.as_json(),
            "previews": [*steps[-200:], *[name for name in previews if name == "contact_sheet.png"]],
        }  # fmt: skip

    def preview(self, run: str, name: str) -> Path:
        """The path of a preview; ValueError if there is none."""
        path = self.folder / check_name(run, "run") / "samples" / check_name(name, "preview")
        if path.suffix != ".png" or not path.is_file():
            raise ValueError(f"there is no preview {name} of {run}.")
        return path

    def _planned(self, name: str) -> int | None:
        """The steps that a run was told to take, by the config in its folder."""
        try:
            path = self.folder / name / "config.yaml"
            found = OmegaConf.load(path) if path.stat().st_size < _BLOCK else None
            steps = OmegaConf.select(found, "train.steps") if found is not None else None
        except Exception:  # any of YAML's or of the system: the curve is shown without its end
            return None
        return steps if isinstance(steps, int) else None

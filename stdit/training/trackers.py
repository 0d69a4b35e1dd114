"""Trackers of a run (TensorBoard, Weights & Biases, Trackio, ...) by accelerate's interface: curves, and previews that move."""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from PIL import Image

from stdit.data.video_io import VideoReader
from stdit.files import read_json, write_json
from stdit.progress import Progress
from stdit.variants import pick

PROJECT = "stdit"  # the project of runs in trackers that have some
_IDS = "trackers.json"  # in a run's folder: what its run is called elsewhere


class Trackers:
    """The trackers of one run, of its main process.

    names: rows of accelerate's table, None for tensorboard if it is installed. output: the folder of the run. start_step:
    where it goes on; tensorboard hides what an earlier process wrote of later steps. ValueError for an unknown tracker, or
    one that is not installed.
    """

    def __init__(self, names: Sequence[str] | None, output: Path, start_step: int = 0, settings: Mapping | None = None):
        self._trackers = {
            name: _start(name, output, start_step, dict(settings or {})) for name in check_trackers(names)
        }

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers to the curves of a step."""
        for tracker in self._trackers.values():
            tracker.log(dict(values), step=step)

    def show(self, files: Mapping[str, Path], step: int) -> None:
        """Add clips and pictures to a step: the name of each, and its file (mp4 or png).

        A tracker that fails says so on stderr, and the run goes on.
        """
        for name, tracker in self._trackers.items():
            try:
                _SHOW.get(name, _show_pictures)(tracker, files, step)
            except Exception as error:  # whatever a service or its client raises must not end a run
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                Progress.write(f"{name} shows no previews of step {step}: {reason}", file=sys.stderr)

    def close(self) -> None:
        """End all trackers, which hold files, threads and connections."""
        for tracker in self._trackers.values():
            tracker.finish()


def check_trackers(names: Sequence[str] | None) -> list[str]:
    """The trackers that are asked for; ValueError for an unknown one, or one that is not installed."""
    installed = {str(getattr(one, "value", one)) for one in get_available_trackers()}
    if names is None:
        return ["tensorboard"] if "tensorboard" in installed else []
    for name in names:
        pick(LOGGER_TYPE_TO_CLASS, name, "tracker in train.trackers")
        if name not in installed:
            raise ValueError(
                f"train.trackers has {name!r}, which is not installed; pip install {name}, or leave it out."
            )
    return list(dict.fromkeys(names))


def _start(name: str, output: Path, start_step: int, settings: dict[str, Any]) -> GeneralTracker:
    kind, run = LOGGER_TYPE_TO_CLASS[name], output.name
    known = read_json(output / _IDS) if start_step else {}
    arguments: dict[str, Any] = {"run_name": PROJECT}
    if name == "tensorboard":
        purge = start_step + 1 if start_step else None
        arguments = {"run_name": "tensorboard", "logging_dir": str(output), "purge_step": purge}
    elif name == "wandb":
        arguments |= {"name": run, "dir": str(output), "config": settings, "resume": "allow", "id": known.get("wandb")}
    elif name == "trackio":
        arguments |= {"name": run, "resume": "allow" if start_step else "never"}
    elif kind.requires_logging_directory:
        arguments |= {"logging_dir": str(output)}
    tracker = kind(**arguments)
    tracker.start()
    if name == "wandb":
        write_json(output / _IDS, {**known, "wandb": tracker.tracker.id})
    return tracker


def _show_tensorboard(tracker: Any, files: Mapping[str, Path], step: int) -> None:
    """As pictures, of which TensorBoard moves those that are gifs; torch's add_video would need moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, path in files.items():
        frames, fps = _frames(path)
        stored = io.BytesIO()
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(stored, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        picture = Summary.Image(
            height=first.height, width=first.width, colorspace=3, encoded_image_string=stored.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=f"previews/{name}", image=picture)])
        tracker.writer._get_file_writer().add_summary(summary, step)
    tracker.writer.flush()


def _show_wandb(tracker: Any, files: Mapping[str, Path], step: int) -> None:
    import wandb

    def shown(path: Path) -> Any:
        return wandb.Video(str(path), format="mp4") if path.suffix == ".mp4" else wandb.Image(str(path))

    # Into the row of now, with their step beside them: the run has gone on, and wandb drops what is of an earlier step.
    tracker.log(
        {**{f"previews/{name}": shown(path) for name, path in files.items()}, "previews/step": step}, commit=False
    )


def _show_trackio(tracker: Any, files: Mapping[str, Path], step: int) -> None:
    import trackio

    def shown(path: Path) -> Any:
        return trackio.Video(str(path), format="mp4") if path.suffix == ".mp4" else trackio.Image(str(path))

    tracker.log({f"previews/{name}": shown(path) for name, path in files.items()}, step=step)


def _show_pictures(tracker: Any, files: Mapping[str, Path], step: int) -> None:
    """The pictures among the files, by a tracker that shows some."""
    if hasattr(tracker, "log_images"):
        pictures = {f"previews/{name}": [_frames(path)[0][0]] for name, path in files.items() if path.suffix == ".png"}
        tracker.log_images(pictures, step=step)


_SHOW: dict[str, Callable[[Any, Mapping[str, Path], int], None]] = {
    "tensorboard": _show_tensorboard,
    "wandb": _show_wandb,
    "trackio": _show_trackio,
}


def _frames(path: Path) -> tuple[list[np.ndarray], float]:
    """The frames of a preview, and their rate."""
    if path.suffix == ".mp4":
        with VideoReader(path) as reader:
            return list(reader.get_frames(list(range(len(reader))))), reader.fps
    with Image.open(path) as picture:
        return [np.asarray(picture.convert("RGB"))], 1.0

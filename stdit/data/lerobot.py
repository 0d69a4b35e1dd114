"""LeRobot datasets as they lie on disk: mp4 files of a camera, and parquet tables of actions (layouts v2.0, v2.1 and v3.0)."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stdit.conditions import ActionSpace
from stdit.conditions.actions import bounded
from stdit.data.backends import Reader
from stdit.data.base import Identity
from stdit.data.clips import VideoClips
from stdit.data.config import DataConfig
from stdit.data.facts import too_short
from stdit.data.identity import content_of, relative_name, size_of
from stdit.data.manifest import Row, Table, as_utf8
from stdit.data.media import VideoError
from stdit.files import inside, read_json

LAYOUTS = ("v2.0", "v2.1", "v3.0")


@dataclass(frozen=True)
class EpisodePlace:
    """Where an episode lies: its number and length, its tasks, its table, its video, and when it begins there in seconds."""

    index: int
    length: int
    tasks: Sequence[str]
    table: Path
    video: Path
    begins: float = 0.0


def is_lerobot(root: Path) -> bool:
    """Whether a folder holds a LeRobot dataset."""
    return (root / "meta" / "info.json").is_file() and "codebase_version" in _info(root)


def _info(root: Path) -> dict[str, Any]:
    try:
        found = read_json(root / "meta" / "info.json")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class LeRobotClips(VideoClips):
    """Windows of the episodes of one camera, with the robot's actions and its task as the caption.

    The action of a row leads to the next frame, so that a frame has the action of the row before it. ValueError, in one
    line, for a dataset of another layout, without videos, or whose tables do not fit.
    """

    def __init__(self, root: Path, config: DataConfig):
        self.root, self.info = root, _info(root)
        version = str(self.info.get("codebase_version"))
        if version not in LAYOUTS:
            raise ValueError(f"{root}: LeRobot layout {version} is unknown; convert it to one of {', '.join(LAYOUTS)}.")
        try:
            self.camera = _camera(root, self.info, config.camera)
            read = _episodes_v3 if version == "v3.0" else _episodes_v2
            self.places = read(root, self.info, self.camera)
            self._fps = float(self.info["fps"])
            if config.fps not in (None, self._fps):
                raise ValueError(
                    f"data.fps={config.fps:g} takes other frames than the {self._fps:g} a second that the actions of {root} belong "
                    "to; set data.fps=null."
                )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{root}: its metadata cannot be read ({type(error).__name__}: {error}); download it again."
            ) from error
        if not self.places:
            raise ValueError(f"{root} has no episodes; record some.")
        rows = [Row(place.video, None, as_utf8("; ".join(place.tasks), str(root))) for place in self.places]
        super().__init__(Table(rows, 0, None), config)

    @cached_property
    def action_space(self) -> ActionSpace | None:
        """The robot's numbers, with their bounds in the data; None without actions."""
        feature = self.info["features"].get("action")
        if feature is None or not str(feature.get("dtype", "")).startswith(("float", "int")):
            return None
        width = int(feature["shape"][0])
        names, bounds = _flat(feature.get("names")), _bounds(self.root)
        fits = bounds is not None and len(bounds[0]) == width and bounded([*bounds[0], *bounds[1]])
        low, high = bounds if bounds is not None and fits else (None, None)
        space = ActionSpace(width=width, names=names if len(names) == width else None, low=low, high=high)
        space.check(f"{self.root}: features.action")
        return space

    def name(self, index: int) -> str:
        """The file of the camera and the number of the episode."""
        return f"{self.rows[index].path}[{self.places[index].index}]"

    def record(self, index: int) -> dict[str, Any]:
        """The task of an episode, and the action that leads to each of its frames, without those of a damaged table."""
        actions = self._actions_if_read(index)
        return {
            "label": None,
            "caption": self.rows[index].caption,
            **({} if actions is None else {"actions": actions}),
        }

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The file and the episode, what is in it, its task, and a hash of its actions."""
        path = self.rows[index].path
        actions = (
            hashlib.sha256(json.dumps(self._actions_if_read(index)).encode()).hexdigest()[:16]
            if read
            else self.places[index].length
        )
        source = self.group_of(index)
        content = content_of(path) if read else size_of(path)
        return Identity(source, content, None, self.rows[index].caption, columns={"actions": actions})

    def group_of(self, index: int) -> str:
        """The file and the episode: a file can hold many."""
        return f"{relative_name(self.rows[index].path, self.root)}[{self.places[index].index}]"

    def shape(self, index: int) -> tuple[int, int, int]:
        """The frames of an episode, and the size of the camera's pictures."""
        return (self.places[index].length, *self._size_of_camera)

    @property
    def rates(self) -> list[float]:
        """The rate of all episodes."""
        return [self._fps]

    def _pick(self, index: int, reader: Reader, count: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        place = self.places[index]
        if self.action_space is not None:
            self._actions(index)  # raises if its table is damaged, so that the episode is set aside
        first = reader.indices_at([place.begins])[0] if place.begins else 0
        if first + place.length > len(reader):
            raise VideoError(
                f"{self.name(index)} has {len(reader) - first} of its {place.length} frames; download it again."
            )
        if place.length < count:
            raise VideoError(f"{self.name(index)} {too_short(place.length, 0.0, count, fps=None)}.")
        start = int(rng.integers(place.length - count + 1))
        return first, list(range(start, start + count))

    @cached_property
    def _size_of_camera(self) -> tuple[int, int]:
        with self._open(self.rows[0].path) as reader:
            return reader.size

    def _actions_if_read(self, index: int) -> list[Any] | None:
        """The actions of an episode; None without any, or if its table is damaged, which `load` says."""
        try:
            return None if self.action_space is None else self._actions(index)
        except VideoError:
            return None

    def _actions(self, index: int) -> list[Any]:
        place = self.places[index]
        values = _read_actions(place.table)
        episode = values.get(place.index)
        if episode is None or len(episode) != place.length:
            found = "none" if episode is None else str(len(episode))
            raise VideoError(
                f"{place.table} has {found} of the {place.length} actions of episode {place.index}; download it again."
            )
        if self.action_space is not None and episode.shape[1] != self.action_space.width:
            raise VideoError(
                f"{place.table} has actions of {episode.shape[1]} numbers, but meta/info.json says {self.action_space.width}; "
                "download it again."
            )
        return [None, *episode[:-1].tolist()]


def _camera(root: Path, info: Mapping[str, Any], asked: str | None) -> str:
    """The name of the camera: the one that is asked for, or the only one."""
    videos = [name for name, feature in info["features"].items() if feature.get("dtype") == "video"]
    pictures = [name for name, feature in info["features"].items() if feature.get("dtype") == "image"]
    if not videos:
        kept = f"it keeps the pictures of {pictures[0]!r} in its tables; " if pictures else ""
        raise ValueError(f"{root} has no videos: {kept}convert it to videos with LeRobot.")
    if asked is None and len(videos) > 1:
        raise ValueError(
            f"{root} has {len(videos)} cameras; choose one: data.camera={videos[0]} (or {', '.join(videos[1:6])})."
        )
    if asked is not None and asked not in videos:
        raise ValueError(f"data.camera={asked!r} is none of {root}; choose one of {', '.join(videos)}.")
    return asked or videos[0]


def _episodes_v2(root: Path, info: Mapping[str, Any], camera: str) -> list[EpisodePlace]:
    """One table and one video for each episode."""
    places = []
    for line in (root / "meta" / "episodes.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        index = int(row["episode_index"])
        parts = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index, "video_key": camera}
        table, video = (_place(root, info[key], parts) for key in ("data_path", "video_path"))
        places.append(EpisodePlace(index, int(row["length"]), _flat(row.get("tasks")), table=table, video=video))
    return places


def _episodes_v3(root: Path, info: Mapping[str, Any], camera: str) -> list[EpisodePlace]:
    """Tables and videos of several episodes each, whose places are in tables of their own."""
    places = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        prefix = f"videos/{camera}"
        names = ["episode_index", "length", "data/chunk_index", "data/file_index", f"{prefix}/chunk_index",
                 f"{prefix}/file_index", f"{prefix}/from_timestamp"]  # fmt: skip
        rows = _parquet(file, [*names, "tasks"])
        for i in range(len(rows["episode_index"])):
            index, length, table_chunk, table_file, chunk, number, begins = (rows[name][i] for name in names)
            table = _place(root, info["data_path"], {"chunk_index": table_chunk, "file_index": table_file})
            video = _place(root, info["video_path"], {"video_key": camera, "chunk_index": chunk, "file_index": number})
            places.append(
                EpisodePlace(
                    int(index), int(length), _flat(rows["tasks"][i]), table=table, video=video, begins=float(begins)
                )
            )
    return sorted(places, key=lambda place: place.index)


def _place(root: Path, pattern: str, parts: Mapping[str, Any]) -> Path:
    """The path that a pattern of info.json names, which must stay under the root."""

    def fill(found: re.Match) -> str:  # no str.format, whose fields can reach into objects
        value = parts[found[1]]
        return f"{int(value):0{int(found[2])}d}" if found[2] else str(value)

    return inside(root, re.sub(r"\{(\w+)(?::0?(\d{1,2})d)?\}", fill, str(pattern)), "the place of an episode")


def _bounds(root: Path) -> tuple[list[float], list[float]] | None:
    """The least and largest action in the data, from the statistics of all episodes; None if there are none."""
    whole, each = root / "meta" / "stats.json", root / "meta" / "episodes_stats.jsonl"
    if whole.is_file():
        stats = [read_json(whole)]
    elif each.is_file():
        stats = [json.loads(line)["stats"] for line in each.read_text(encoding="utf-8").splitlines()]
    else:
        return None
    if not all("action" in one for one in stats):
        return None
    lows, highs = (np.array([one["action"][key] for one in stats], dtype=float) for key in ("min", "max"))
    return lows.min(0).tolist(), highs.max(0).tolist()


@lru_cache(maxsize=64)
def _read_actions(table: Path) -> dict[int, np.ndarray]:
    """The actions of every episode of a table, each (length, width), in the order of its frames."""
    columns = _parquet(table, ["episode_index", "frame_index", "action"])
    episodes, frames = np.array(columns["episode_index"]), np.array(columns["frame_index"])
    try:
        actions = np.array(columns["action"], dtype=np.float32).reshape(len(frames), -1)  # one number is no list there
    except (TypeError, ValueError) as error:
        raise VideoError(f"{table} has actions that are no rows of numbers ({error}); download it again.") from error
    found = {}
    for index in np.unique(episodes).tolist():
        chosen = np.flatnonzero(episodes == index)
        found[index] = actions[chosen[np.argsort(frames[chosen])]]
    return found


def _parquet(file: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of a parquet file, as lists."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            "LeRobot's tables need pyarrow, which is not installed: pip install 'stdit[lerobot]'."
        ) from error
    try:
        return pyarrow.parquet.read_table(file, columns=list(columns)).to_pydict()
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise VideoError(f"{file} cannot be read ({' '.join(str(error).split())[:160]}); download it again.") from error


def _flat(names: Any) -> list[str]:
    """Names as LeRobot writes them: a list, a mapping that holds lists, or nothing."""
    if isinstance(names, Mapping):
        return [name for value in names.values() for name in _flat(value)]
    if isinstance(names, str):
        return [names]
    return [str(name) for name in names or ()]

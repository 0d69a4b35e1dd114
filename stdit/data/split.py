"""Long videos into clips: each video cut into files by a process, with an entry that says what became of it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.media import VideoError, state_of
from stdit.data.scenes import Clip, ClipRules, clips_of, lengths, sift, survey
from stdit.data.video_io import VideoReader
from stdit.data.video_write import VideoStream

_HEARTBEAT = 100  # frames between two signs of life to the main process


class Source(NamedTuple):
    """A video to be cut. name: what it is called in the manifest; its clips are called after it. label: its class, if any."""

    path: Path
    name: str
    label: str | None = None

    @property
    def prefix(self) -> str:
        """What the names of its clips begin with, relative to the output folder, short enough for a number behind it."""
        folder, stem = os.path.split(Path(self.name).with_suffix("").as_posix())
        while len(os.fsencode(stem)) > 200:
            stem = stem[:-1]
        return f"{folder}/{stem}" if folder else stem


class Splitter:
    """Videos to cut, as the loader's processes load samples: by number, each to its entry.

    side: pixels of the shorter side of the clips, None for that of the video; nothing is enlarged.
    """

    def __init__(self, sources: list[Source], output: Path, rules: ClipRules, side: int | None):
        self.sources, self.output, self.rules, self.side = sources, output, rules, side

    def load(self, key: int, set_aside: Mapping[str, str], reading: Callable[[str], None]) -> dict[str, Any]:
        """Cut a video into files that are not there yet -> its entry; what cannot be read is refused in it."""
        source = self.sources[key]
        name = str(source.path)
        size, modified = state_of(source.path)
        entry: dict[str, Any] = {"video": source.name, "bytes": size, "modified": modified}
        if name in set_aside:
            return {**entry, "refused": set_aside[name].removeprefix(repr(name)).strip()}
        reading(name)
        try:
            with VideoReader(source.path) as reader:
                return entry | self._split(source, reader, _Heartbeat(lambda: reading(name)))
        except VideoError as error:
            return {**entry, "refused": str(error).removeprefix(repr(name)).strip()}

    def _split(self, source: Source, reader: VideoReader, progress: Callable[[], None]) -> dict[str, Any]:
        rules = self.rules
        if rules.fps > 1.01 * reader.fps:
            raise VideoError(f"has {reader.fps:.4g} frames a second, fewer than {rules.fps:g}; lower --fps.")
        found = survey(reader, rules.threshold, progress)
        used, left_out = sift(found, clips_of(found, reader.indices_at, rules), rules)
        rows = [self._write(source, reader, clip, progress) for clip in used]
        longest = round(max(lengths(found)), 2)
        return {"scenes": len(found.starts) - 1, "longest": longest, "left_out": left_out, "rows": rows}

    def _write(self, source: Source, reader: VideoReader, clip: Clip, progress: Callable[[], None]) -> dict[str, Any]:
        """Write a clip, unless an earlier call has -> its row of the manifest."""
        name = f"{source.prefix}-{clip.indices[0]:07d}.mp4"
        path = self.output / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with VideoStream(path, self.rules.fps) as video:
                for frame in reader.iter_frames(clip.indices, self._size(reader.size)):
                    video.add(frame[None])
                    progress()
        label = {} if source.label is None else {"label": source.label}
        about = {"source": source.name, "scene": f"{source.name}#{clip.scene}", "start": round(clip.start, 3)}
        return {"path": name, **label, "caption": "", **about}

    def _size(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """The even size (H, W) of the clips of a video; None for its own."""
        if self.side is None or self.side >= min(size):
            return None
        height, width = (2 * max(1, round(side * self.side / min(size) / 2)) for side in size)
        return height, width


class _Heartbeat:
    """A call for every frame, of which every hundredth is passed on."""

    def __init__(self, beat: Callable[[], None]):
        self.beat, self.count = beat, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count % _HEARTBEAT == 0:
            self.beat()

"""The output folder of NVIDIA's cosmos-curate: clips, and what was found out about each of them.

Layout as in its version 1.4.0 (docs/curator/reference/VIDEO_PIPELINES.md, and its writer of metadata): clips/UUID.mp4, or
clips/UUID/CAMERA.mp4 of several cameras, with metas/v0/UUID.json for each UUID, or a line for each in metas_jsonl/v0/*.jsonl,
or a row for each in the table of Lance lance/v0.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stdit.data.arrow_tables import lance_rows
from stdit.data.folders import is_folder, names_in, walk
from stdit.data.media import open_regular
from stdit.data.records import Record, read_rows
from stdit.files import LARGEST_JSON

_CLIPS = "clips"
_SINGLE, _GROUPED, _TABLE = "metas/v0", "metas_jsonl/v0", "lance/v0"
_LISTED = 8  # columns named in a message
_LEFT_OUT = {"windows", "filtered_windows", "embedding", "clip_location", "errors"}


def is_curated(root: Path) -> bool:
    """Whether a folder is the output of cosmos-curate."""
    return is_folder(root / _CLIPS) and any(is_folder(root / name) for name in (_SINGLE, _GROUPED, _TABLE))


def read_curated(root: Path, given: Mapping[str, str] | None) -> list[Record]:
    """A row for every clip that was kept, in the order of their names; what the metas say of numbers and texts are columns.

    The caption is the first of a window of the clip, an enhanced one if there is one. given: another column for it under
    "caption", such as qwen_caption. ValueError with the file and a remedy.
    """
    metas = dict(_metas(root))
    records, labelled = [], False
    wanted, label = (given or {}).get("caption"), (given or {}).get("label")
    for line, name in enumerate(_clips(root)):
        meta = metas.get(Path(name.partition("/")[0]).stem, {})
        values = {
            key: value for key, value in meta.items() if key not in _LEFT_OUT and isinstance(value, str | int | float)
        }
        motion = meta.get("motion_score")
        if isinstance(motion, dict) and isinstance(motion.get("global_mean"), int | float):
            values["motion_score"] = motion["global_mean"]
        windows = meta.get("windows")
        caption = _caption(
            [one for one in windows if isinstance(one, dict)] if isinstance(windows, list) else [], wanted
        )
        if label is not None and label in values:
            values["label"] = values[label]
            labelled = True
        records.append(Record(line + 1, {**values, "path": f"{_CLIPS}/{name}", "caption": caption}))
    if label is not None and records and not labelled:
        known = ", ".join(
            repr(name) for name in sorted({name for record in records for name in record.values})[:_LISTED]
        )
        raise ValueError(f"{root}: no clip has {label!r} (data.columns.label); there are {known}.")
    if wanted is not None and records and not any(record.values["caption"] for record in records):
        raise ValueError(f"{root}: no window has {wanted!r} (data.columns.caption); see the names in {root}.")
    return records


def _clips(root: Path) -> Iterator[str]:
    """The clips that were kept, by their names below the folder of clips, in order."""
    above = root / _CLIPS
    for folder, folders, files in walk(above):
        folders.sort()
        for name in sorted(files):
            if name.lower().endswith(".mp4"):
                yield Path(folder, name).relative_to(above).as_posix()


def _metas(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was found out, by the name of the clip."""
    for name in names_in(root / _GROUPED):
        if name.lower().endswith(".jsonl"):
            for _, row in read_rows(root / _GROUPED / name):
                yield str(row.get("span_uuid")), row
    if is_folder(root / _TABLE):
        for row in lance_rows(root / _TABLE, _LEFT_OUT - {"windows"}):
            yield str(row.get("span_uuid")), row
    for name in names_in(root / _SINGLE):
        if name.lower().endswith(".json"):
            file = root / _SINGLE / name
            try:
                with open_regular(file) as stream:
                    row = json.loads(stream.read(LARGEST_JSON))
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{file} cannot be read ({error}); run cosmos-curate again for it, or remove it."
                ) from error
            yield file.stem, row


def _caption(windows: list[dict[str, Any]], wanted: str | None) -> str:
    """The first caption of windows in time; enhanced ones go first."""
    for suffix in ("_enhanced_caption", "_caption"):
        for window in windows:
            for key, text in window.items():
                chosen = key == wanted if wanted is not None else key.endswith(suffix)
                if chosen and isinstance(text, str) and text.strip():
                    return text.strip()
    return ""

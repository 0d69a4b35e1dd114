"""What a check of media files found: an overview in text, a picture of the files, and a manifest of the usable ones."""

import re
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from stdit.data.backends import open_video
from stdit.data.config import DataConfig
from stdit.data.datasets import Images, VideoClips
from stdit.data.facts import Facts
from stdit.data.folders import named_from, resolved
from stdit.data.media import VideoError
from stdit.data.pictures import read_picture
from stdit.data.records import write_records
from stdit.data.stores import with_urls
from stdit.data.transforms import resize
from stdit.files import atomic_write, printable

_LISTED = 20  # files named one by one
_TILE, _TEXT, _COLUMNS, _TILES = (120, 160), 14, 6, 60


class Checked(NamedTuple):
    """A file that was read. entry: its line of the report; facts: None if unreadable; reason: why it is not used, or None."""

    path: Path
    entry: dict[str, Any]
    facts: Facts | None
    reason: str | None


def kind(reason: str) -> str:
    """The kind of a reason, the same for files that differ in numbers and details only."""
    words = re.sub(r"\([^)]*\)", "", reason.partition(";")[0])
    return " ".join(re.sub(r"\d+(\.\d+)?", "N", words).split())


def overview(checked: Mapping[Path, Checked], dataset: VideoClips | Images, config: DataConfig, *, ruled: bool) -> str:
    """Counts by reason, lengths, rates and sizes, captions and labels, as lines of text; what to do comes last.

    ruled: whether `config` is that of a training, whose rules were applied.
    """
    bad = [one for one in checked.values() if one.reason]
    read = [one.facts for one in checked.values() if one.facts]
    frames = sum(facts.frames for facts in read)
    lines = [f"{_name(one.path)} {printable(_shown(one))}" for one in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"... and {len(bad) - _LISTED} more; --report FILE has all of them")
    lines.append(f"{len(read)} of {len(checked)} files read in full, {frames} frames")
    lines += _counts("not used", [kind(one.reason or "") for one in bad])
    lines += _counts("used, but", [kind(note) for one in checked.values() for note in one.entry.get("notes", [])])
    lines += _distributions([one.facts for one in checked.values() if one.facts and not one.reason])
    lines += _annotations(dataset)
    if ruled:
        lines.append(f"training uses {len(checked) - len(bad)} of {len(checked)} files")
    else:
        lines.append("whether they are long enough for a training: --config NAME [key=value ...]")
    if bad:
        share = len(bad) / len(checked)
        stops = (
            f", and stops above data.max_bad_fraction={config.max_bad_fraction:g}"
            if share > config.max_bad_fraction
            else ""
        )
        lines.append(
            f"Training leaves such files out ({share:.1%} here{stops}). --manifest FILE writes a manifest without them; "
            "to use a damaged one, encode it anew (ffmpeg -i OLD -c:v libx264 -crf 16 NEW)."
        )
    timed = [one for one in checked.values() if "seconds" in one.entry]
    if timed:
        slowest = max(timed, key=lambda one: one.entry["seconds"])
        lines.append(f"slowest: {slowest.entry['seconds']} s ({_name(slowest.path)})")
    return "\n".join(lines)


def _shown(one: Checked) -> str:
    """The reason of a file; with what to change in the config, but not with remedies of the reader's in Python."""
    reason = str(one.reason)
    return reason if one.facts else reason.partition(";")[0]


def _name(path: Path) -> str:
    return repr(printable(with_urls(str(path))))


def _counts(title: str, kinds: Collection[str]) -> list[str]:
    return [f"  {title}: {count:>6}  {printable(one)}" for one, count in Counter(kinds).most_common()]


def _distributions(facts: Sequence[Facts]) -> list[str]:
    """The range of lengths, and the most common rates and sizes, of the files that are used."""
    if not facts:
        return []
    lines = []
    videos = [one for one in facts if not one.is_image]
    if len(videos) < len(facts):
        lines.append(f"  pictures: {len(facts) - len(videos)}")
    if videos:
        lines.append(f"  frames: {_range([one.frames for one in videos])}")
        lines.append(f"  seconds: {_range([round(one.frames / one.fps, 2) for one in videos])}")
        lines.append(f"  frames a second: {_common([f'{round(one.fps, 2):g}' for one in videos])}")
    lines.append(f"  height x width: {_common([f'{one.height} x {one.width}' for one in facts])}")
    return lines


def _range(values: Sequence[float]) -> str:
    return f"{min(values):g} to {max(values):g}, half of the files at most {statistics.median_low(values):g}"


def _common(values: Sequence[str], most: int = 6) -> str:
    counts = Counter(values).most_common()
    more = f", {len(counts) - most} others" if len(counts) > most else ""
    return ", ".join(f"{value} ({count} {'file' if count == 1 else 'files'})" for value, count in counts[:most]) + more


def _annotations(dataset: VideoClips | Images) -> list[str]:
    """How many rows have captions, how many classes there are, and which further columns."""
    rows = dataset.rows
    captions = sum(bool(row.caption) for row in rows)
    hint = "" if captions else " (a column 'caption' of a manifest, or a.txt next to a.mp4)"
    lines = [f"  captions: {captions} of {len(rows)} clips have one{hint}"]
    if len({row.path for row in rows}) < len(rows):
        lines.append(f"  rows: {len(rows)}, several of one file")
    if dataset.num_classes:
        per_class = Counter(row.label for row in rows)
        fewest = min(per_class, key=lambda label: per_class[label])
        name = dataset.class_names[fewest] if dataset.class_names and fewest is not None else fewest
        lines.append(
            f"  labels: {len(per_class)} of {dataset.num_classes} classes have clips; the fewest: {per_class[fewest]} "
            f"of class {printable(str(name))!r}"
        )
    further = list(dict.fromkeys(name for row in rows for name in row.columns))
    if further:
        lines.append(f"  further columns: {', '.join(printable(name) for name in further[:12])}")
    return lines


def write_clean_manifest(path: Path, checked: Mapping[Path, Checked], dataset: VideoClips | Images) -> int:
    """Write the rows whose files are used as a manifest, with paths relative to it -> their number."""
    rows, names = [], dataset.class_names
    captioned = any(row.caption for row in dataset.rows)
    folder = path.resolve().parent
    for row in dataset.rows:
        if checked[row.path].reason is None:
            record: dict[str, Any] = {"path": named_from(resolved(row.path), folder)}
            if row.label is not None:
                record["label"] = names[row.label] if names else row.label
            if captioned:
                record["caption"] = row.caption
            rows.append({**row.columns, **record})
    if not rows:
        raise ValueError(f"no file can be used, so {path} is not written; see the reasons above.")
    write_records(path, rows)
    return len(rows)


def write_sheet(path: Path, checked: Mapping[Path, Checked]) -> int:
    """Write a picture of one frame of up to 60 usable files, spread over all, with their names -> their number."""
    usable = [one for one in checked.values() if one.facts and not one.reason]
    if not usable:
        raise ValueError(f"no file can be used, so {path} is not written; see the reasons above.")
    picked = [usable[i] for i in sorted({int(i) for i in np.linspace(0, len(usable) - 1, _TILES)})]
    height, width = _TILE[0] + _TEXT, _TILE[1]
    sheet = Image.new("RGB", (width * min(_COLUMNS, len(picked)), height * -(-len(picked) // _COLUMNS)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, one in enumerate(picked):
        left, top = width * (number % _COLUMNS), height * (number // _COLUMNS)
        tile = Image.fromarray(_thumbnail(one))
        sheet.paste(tile, (left + (width - tile.width) // 2, top + (_TILE[0] - tile.height) // 2))
        draw.text((left + 2, top + _TILE[0] + 1), ascii(one.path.name)[1:-1][-26:], fill="black")
    with atomic_write(path) as tmp:
        sheet.save(tmp, format="png")
    return len(picked)


def _thumbnail(one: Checked) -> np.ndarray:
    """The frame in the middle of a file (h, w, 3) uint8, within a tile; grey if it cannot be read any more."""
    assert one.facts is not None
    height, width = one.facts.height, one.facts.width
    scale = min((_TILE[0] - 4) / height, (_TILE[1] - 4) / width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    try:
        if one.facts.is_image:
            return resize(read_picture(one.path)[None], size)[0]
        with open_video(one.path) as reader:
            return resize(reader[len(reader) // 2][None], size)[0]
    except VideoError:
        return np.full((*size, 3), 128, np.uint8)

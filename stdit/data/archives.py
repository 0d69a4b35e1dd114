"""Clips in tar archives, as WebDataset keeps them: files of one name are a sample, such as a.mp4, a.txt and a.json.

A file in an archive has a path like any other, SHARD.tar@OFFSET+SIZE/NAME, so that samples are read in any order without
unpacking; every reader of media opens it.
"""

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.folders import names_in
from stdit.data.media import VIDEO_SUFFIXES, is_one_of, member_of, open_regular, state_of
from stdit.data.records import Record, find_columns, listed

_TEXT, _LABEL, _JSON = ".txt", ".cls", ".json"
_MAX_TEXT = 1 << 20  # bytes of a sample's text or JSON


class _Sample(NamedTuple):
    """The files of a sample: its clip, and its annotations by suffix."""

    name: str
    clip: Path
    notes: dict[str, bytes]


def find_archives(root: Path) -> list[Path]:
    """The tar archives of a folder, in order."""
    return [root / name for name in names_in(root) if name.lower().endswith(".tar")]


def is_archived(root: Path) -> bool:
    """Whether a folder holds tar archives."""
    return bool(find_archives(root))


def read_archives(root: Path, given: Mapping[str, str] | None = None) -> list[Record]:
    """The clips of all archives in a folder, in their order, with captions, labels and further columns.

    The caption is that of NAME.txt, or of NAME.json under the names that manifests have; the label is NAME.cls, or that of the
    JSON. A `given` name (role -> name) takes the place of both. What else the JSON has are further columns. ValueError with the
    archive and a remedy.
    """
    samples = [sample for archive in find_archives(root) for sample in _scan(archive)]
    if not samples:
        raise ValueError(
            f"the archives in {str(root)!r} hold no clips ({', '.join(sorted(VIDEO_SUFFIXES))}); give a folder of shards of WebDataset."
        )
    find_columns((), str(root), given)  # raises for what is no role
    given = {role: name for role, name in (given or {}).items() if role != "path"}
    names: set[str] = set()
    found = [_annotations(sample, given, names) for sample in samples]
    for role, name in given.items():
        if name not in names:
            have = listed(sorted(names)) if names else "no columns"
            raise ValueError(f"{root}: no JSON of a clip has {name!r} (data.columns.{role}); they have {have}.")
    return [
        Record(line, {**values, "path": str(sample.clip.relative_to(root))})
        for line, (sample, values) in enumerate(zip(samples, found, strict=True), 1)
    ]


def _scan(archive: Path) -> list[_Sample]:
    """The samples of an archive, from its headers and annotations."""
    clips: dict[str, Path] = {}
    notes: dict[str, dict[str, bytes]] = {}
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                name = Path(member.name)
                key, suffix = str(name.with_suffix("")), name.suffix.lower()
                if is_one_of(name, VIDEO_SUFFIXES):
                    if key in clips:
                        raise ValueError(
                            f"{archive} has two clips of the name {key!r}, {clips[key].name} and {name.name}; leave one out."
                        )
                    clips[key] = Path(f"{archive}@{member.offset_data}+{member.size}", name.name)
                elif suffix in (_TEXT, _LABEL, _JSON) and member.size <= _MAX_TEXT:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    notes.setdefault(key, {})[suffix] = stream.read()
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{archive} is no tar archive that can be read ({error}); fetch it again.") from error
    size = state_of(archive)[0]
    last = max((found.offset + found.size for path in clips.values() if (found := member_of(path))), default=0)
    if last > size or size < end:
        raise ValueError(f"{archive} is cut short: it has {size} bytes of {max(last, end)}; fetch it again.")
    return [_Sample(key, clip, notes.get(key, {})) for key, clip in clips.items()]


def _annotations(sample: _Sample, given: Mapping[str, str], names: set[str]) -> dict[str, Any]:
    """Label, caption and further columns of a sample; the names that its JSON has are added to `names`."""
    found: dict[str, Any] = {}
    try:
        if _JSON in sample.notes:
            values = json.loads(sample.notes[_JSON])
            if not isinstance(values, dict):
                raise ValueError("it is no object")
            names.update(values)
            here = {role: name for role, name in given.items() if name in values}
            roles = find_columns(values, f"{sample.clip}{_JSON}", here, but=given)
            # Where a column was named no other is taken for it, also in a JSON that lacks it.
            found = {name: value for name, value in values.items() if name not in roles and name not in given}
            found |= {role: values[name] for name, role in roles.items() if role != "path"}
        if _TEXT in sample.notes and "caption" not in given:
            found["caption"] = sample.notes[_TEXT].decode("utf-8-sig").strip()
        if _LABEL in sample.notes and "label" not in given:
            found["label"] = sample.notes[_LABEL].decode().strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the annotations of {sample.clip} cannot be read ({error}); correct them.") from error
    return found

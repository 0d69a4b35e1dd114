"""Clips in tar archives, as WebDataset keeps them: files of one name are a sample, such as a.mp4, a.txt and a.json.

What follows the first dot of a name says which file of a sample it is: a.left.mp4 and a.right.mp4 are two clips of one. A file
in an archive has a path like any other, SHARD.tar@OFFSET+SIZE/NAME, so that samples are read in any order without unpacking;
every reader of media opens it.
"""

import json
import tarfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.folders import names_in
from stdit.data.media import VIDEO_SUFFIXES, container_of, is_one_of, member_of, open_regular, state_of
from stdit.data.records import Record, find_columns, listed
from stdit.warn import warn_user

_TEXT, _LABEL, _JSON = "txt", "cls", "json"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_TEXT = 1 << 20  # bytes of a sample's text or JSON


class _Sample(NamedTuple):
    """A clip, its name up to the first dot (`key`) and what follows (`kind`), and the annotations of its sample by theirs.

    others: what the other clips of the sample have before their suffix, so that a.left.txt is no caption of a.right.mp4.
    """

    clip: Path
    key: str
    kind: str
    notes: dict[str, bytes]
    others: set[str]


def find_archives(root: Path) -> list[Path]:
    """The tar archives of a folder, in order."""
    return [root / name for name in names_in(root) if name.lower().endswith(".tar")]


def is_archived(root: Path) -> bool:
    """Whether a folder holds tar archives, also packed ones, which reading refuses."""
    return bool(find_archives(root) or _packed_in(root))


def read_archives(root: Path, given: Mapping[str, str] | None = None) -> list[Record]:
    """The clips of all archives in a folder, in their order, with captions, labels and further columns.

    The caption is that of NAME.txt, or of NAME.json under the names that manifests have; the label is NAME.cls, or that of the
    JSON. A `given` name (role -> name) takes the place of both: that of a file of the samples (left.mp4, long.txt), or of a
    column of the JSON. What else the JSON has are further columns. ValueError with the archive and a remedy.
    """
    given = dict(given or {})
    find_columns((), str(root), given)  # raises for what is no role
    archives, packed = find_archives(root), _packed_in(root)
    if packed and not archives:
        raise ValueError(
            f"{root / packed[0]} is packed, so that the clips in it cannot be read in any order; unpack it to a .tar (gunzip)."
        )
    if packed:
        warn_user(f"{root}: packed archives are left out (the first: {packed[0]!r}); unpack them to .tar.")
    wanted = {name.lower() for name in given.values()}
    samples = [sample for archive in archives for sample in _scan(archive, wanted)]
    if not samples:
        raise ValueError(
            f"the archives in {str(root)!r} hold no clips ({', '.join(sorted(VIDEO_SUFFIXES))}); give a folder of shards of WebDataset."
        )
    kinds = {sample.kind for sample in samples}
    path = given.pop("path", None)
    if path is not None:
        if path.lower() not in kinds:
            raise ValueError(
                f"{root}: no clip is called NAME.{path} (data.columns.path); there are {listed(sorted(kinds))}."
            )
        samples = [sample for sample in samples if sample.kind == path.lower()]
    _check_names(samples)
    names: set[str] = set()
    found = [_annotations(sample, given, names) for sample in samples]
    for role, name in given.items():
        if name not in names and name.lower() not in names:
            have = listed(sorted(names)) if names else "no columns"
            raise ValueError(
                f"{root}: no sample has {name!r}, as a file or in its JSON (data.columns.{role}); they have {have}."
            )
    return [
        Record(line, {**values, "path": str(sample.clip.relative_to(root))})
        for line, (sample, values) in enumerate(zip(samples, found, strict=True), 1)
    ]


def _packed_in(root: Path) -> list[str]:
    return [name for name in names_in(root) if name.lower().endswith(_PACKED)]


def _scan(archive: Path, wanted: Collection[str]) -> list[_Sample]:
    """The clips of an archive in their order, from its headers, with their annotations; wanted: further names of those."""
    clips: list[tuple[Path, str, str]] = []
    notes: dict[str, dict[str, bytes]] = {}
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = Path(member.name)
                first, _, kind = name.name.partition(".")
                if not member.isfile() or not first:
                    continue
                key, kind = str(name.with_name(first)), kind.lower()
                if is_one_of(name, VIDEO_SUFFIXES):
                    clips.append((Path(f"{archive}@{member.offset_data}+{member.size}", name.name), key, kind))
                elif (kind in wanted or _suffix(kind) in (_TEXT, _LABEL, _JSON)) and member.size <= _MAX_TEXT:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    notes.setdefault(key, {})[kind] = stream.read()
            file.seek(end := tar.offset)
            ended = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # else tarfile ends where the file ends
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{archive} is no tar archive that can be read ({error}); fetch it again.") from error
    size = state_of(archive)[0]
    last = max((found.offset + found.size for path, _, _ in clips if (found := member_of(path))), default=0)
    if last > size or not ended:
        of = f"of {max(last, end)}" if max(last, end) > size else "and no blocks of zeros at its end"
        raise ValueError(f"{archive} is cut short: it has {size} bytes {of}; fetch it again.")
    stems: dict[str, set[str]] = {}
    for _, key, kind in clips:
        stems.setdefault(key, set()).add(_stem(kind))
    return [
        _Sample(clip, key, kind, notes=notes.get(key, {}), others=stems[key] - {_stem(kind)})
        for clip, key, kind in clips
    ]


def _check_names(samples: Iterable[_Sample]) -> None:
    """ValueError where two clips of an archive have the same annotations, since they differ in their suffix alone."""
    known: dict[tuple[str | None, str, str], _Sample] = {}
    for sample in samples:
        archive = container_of(sample.clip)
        other = known.setdefault((archive, sample.key, _stem(sample.kind)), sample)
        if other is not sample:
            raise ValueError(
                f"{archive} has two clips of the name {sample.key!r}, {other.clip.name} and {sample.clip.name}; leave one out, "
                f"or say which: data.columns={{path: {other.kind}}}."
            )


def _stem(kind: str) -> str:
    return kind.rpartition(".")[0]


def _suffix(kind: str) -> str:
    return kind.rpartition(".")[2]


def _own(sample: _Sample, suffix: str) -> list[str]:
    """The annotation of a clip with a suffix: the one that is called as it is, else the sample's; several where that is open."""
    found = [kind for kind in sample.notes if _suffix(kind) == suffix]
    own = [kind for kind in (f"{_stem(sample.kind)}.{suffix}", suffix) if kind in found]
    return own[:1] or sorted(kind for kind in found if _stem(kind) not in sample.others)


def _annotations(sample: _Sample, given: Mapping[str, str], names: set[str]) -> dict[str, Any]:
    """Label, caption and further columns of a sample; the names that it has are added to `names`."""
    found: dict[str, Any] = {}
    names.update(sample.notes)
    files = {role: [name.lower()] for role, name in given.items() if name.lower() in sample.notes}
    try:
        if len(own := _own(sample, _JSON)) == 1:
            values = json.loads(sample.notes[own[0]])
            if not isinstance(values, dict):
                raise ValueError("it is no object")
            names.update(values)
            here = {role: name for role, name in given.items() if name in values and role not in files}
            roles = find_columns(values, f"{sample.clip}.{_JSON}", here, but=given)
            # Where a column was named no other is taken for it, also in a JSON that lacks it.
            found = {name: value for name, value in values.items() if name not in roles and name not in given}
            found |= {role: values[name] for name, role in roles.items() if role != "path"}
        for role, suffix in (("caption", _TEXT), ("label", _LABEL)):
            kinds = files.get(role) or ([] if role in given else _own(sample, suffix))
            if len(kinds) > 1:
                raise ValueError(
                    f"{listed(kinds)} could each be the {role}; say which: data.columns={{{role}: {kinds[0]}}}"
                )
            if kinds:
                found[role] = sample.notes[kinds[0]].decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the annotations of {sample.clip} cannot be read ({error}); correct them.") from error
    return found

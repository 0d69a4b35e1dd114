"""What a sample is, in whatever folder it lies, and the fingerprint of all samples of a dataset."""

import hashlib
import json
from pathlib import Path
from typing import Any

from stdit.data.base import Dataset, Identity
from stdit.data.folders import resolved
from stdit.data.media import VideoError, open_regular, state_of

PART = 65536  # bytes read at the beginning, in the middle and at the end of a file


def relative_name(path: Path, root: Path) -> str:
    """The path of a file below `root`, with slashes; its name alone if it lies elsewhere."""
    for base in (root, resolved(root)):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return path.name


def size_of(path: Path) -> int | None:
    """The size of a file in bytes (of one in a table: that of the table); None if there is no such file."""
    size = state_of(path)[0]
    return None if size < 0 else size


def content_of(path: Path) -> str | None:
    """A hash of the size of a file, its beginning, its middle and its end, however large it is; None without a file."""
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            for start in (0, max(0, size // 2 - PART // 2), max(0, size - PART)):
                stream.seek(start)
                digest.update(stream.read(PART))
    except (OSError, VideoError):
        return None
    return digest.hexdigest()[:32]


def hash_of(value: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(_plain(value)).hexdigest()[:16]


def clip_of(one: Identity) -> list[Any]:
    """What is in a sample, without its annotations and, as far as its content says it, wherever it lies."""
    return [one.content] if one.by_content and one.content is not None else [one.source, one.content]


def columns_of(one: Identity) -> list[tuple[str, Any]]:
    """The further columns of a sample, in the order of their names."""
    return sorted(((str(name), value) for name, value in one.columns.items()), key=lambda column: column[0])


def _plain(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def identity_of(dataset: Dataset, index: int, *, read: bool = False) -> Identity:
    """The identity of a sample. read: by the content of its file, which finds another file of the same name and size."""
    if hasattr(dataset, "identity"):
        return dataset.identity(index, read=read)
    path, record = Path(dataset.name(index)), dict(dataset.record(index))
    label, caption = record.pop("label", None), record.pop("caption", "")
    return Identity(path.name, content_of(path) if read else size_of(path), label, caption, columns=record)


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What a run was trained on, as plain values: classes, number of samples, and hashes of their ordered identities.

    Files, labels, captions and further columns have a hash each, so that a difference says what changed.
    """
    if (known := getattr(dataset, "known_fingerprint", None)) is not None:
        return dict(known)
    hashes = {name: hashlib.sha256() for name in ("files", "labels", "captions", "columns")}
    for index in range(len(dataset)):
        one = identity_of(dataset, index)
        parts = ((one.source, one.content), one.label, one.caption, columns_of(one))
        for digest, part in zip(hashes.values(), parts, strict=True):
            if part not in (None, "", []):  # data without captions has one hash of captions, however large it is
                digest.update(_plain((index, part)))
    return {
        "classes": dataset.num_classes if dataset.class_names is None else list(dataset.class_names),
        "samples": len(dataset),
        **{name: digest.hexdigest()[:16] for name, digest in hashes.items()},
    }

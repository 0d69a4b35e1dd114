"""An index of a folder or manifest is made, by reading the files that an earlier one does not know."""

import os
from pathlib import Path
from typing import Any

import av

from stdit.data.actions import known_actions
from stdit.data.clips import Images, VideoClips
from stdit.data.columns import looks_like_table
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset, source_of
from stdit.data.identity import fingerprint
from stdit.data.index import SUFFIX, MediaIndex, entries_of, note_states, source_state, write_index
from stdit.data.inspections import inspect_all
from stdit.data.manifest import Table
from stdit.data.stores import is_remote, is_url, url_of
from stdit.warn import warn_user

TIMEOUT, MEMORY = 300.0, 4.0  # seconds and GB for one file in a process that reads


def make_index(
    data: DataConfig,
    output: Path,
    *,
    source: Path,
    hashed: bool = False,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    memory: float = MEMORY,
) -> tuple[VideoClips | Images, dict[Path, dict[str, Any]]]:
    """Write the index of a dataset, reading the files that an index there does not know -> dataset, the entry of every file.

    source: the folder or manifest of the dataset. The others are those of `stdit index`.
    """
    root = Path(data.root)
    if not (is_remote(root) or is_url(root) or root.is_dir()):
        raise ValueError(
            f"data.root={data.root!r} is no folder, and an index keeps the places of files below it; set data.root to the folder of the "
            "files."
        )
    before = source_state(source)  # reading takes hours, in which the source may change
    dataset = build_dataset(data)
    if not isinstance(dataset, VideoClips | Images):
        raise ValueError(f"{str(source)!r} holds no files of videos or pictures; an index is of nothing else.")
    av.logging.set_level(None)
    notes = note_states(dataset.rows)
    paths = list(dict.fromkeys(row.path for row in dataset.rows))
    journal = output.with_suffix(".partial.jsonl")
    earlier = {os.path.realpath(file): entry for file, entry in _entries(output).items()}
    absolute = {str(path): os.path.realpath(path) for path in paths}
    known = {name: {**earlier[found], "path": name} for name, found in absolute.items() if found in earlier}
    limits: dict[str, Any] = {"workers": workers, "timeout": timeout, "memory": memory}
    entries = inspect_all(paths, journal, backend=data.backend, known=known, **limits)
    write_index(
        output, Table(dataset.rows, dataset.num_classes, dataset.class_names),
        {str(path): entry for path, entry in zip(paths, entries, strict=True)}, source=source, root=root,
        fingerprint=fingerprint(dataset), action_space=known_actions(dataset), settings=row_settings(data),
        hashed=hashed or any("content" in entry for entry in known.values()), before=before, notes=notes,
    )  # fmt: skip
    journal.unlink(missing_ok=True)
    return dataset, dict(zip(paths, entries, strict=True))


def row_settings(data: DataConfig) -> dict[str, Any]:
    """What the rows of an index depend on besides its source and its root."""
    if data.manifest is not None:  # which has its rows whatever they are read as
        return {"columns": dict(data.columns), "source": data.source, "pictures": False}
    source = source_of(data)
    pictures = source == "videos" and any(size[0] == 1 for size in data.sizes)  # which are clips of one frame
    return {"columns": dict(data.columns), "source": source, "pictures": pictures}


def check_output(output: Path, source: Path, option: str = "--output ") -> None:
    """Raise ValueError for another suffix, for what is no index, and for one inside the folder of its files, whose time it would change."""
    if output.suffix != SUFFIX:
        raise ValueError(f"{option}{output} is no name of an index; call it {output.with_suffix(SUFFIX)}.")
    if output.exists() and not looks_like_table(output):
        raise ValueError(f"{option}{output} is there and is no index; choose another name.")
    if source.suffix == SUFFIX:
        raise ValueError(
            f"{url_of(source) if is_url(source) else source} is an index already; give the folder or manifest that it was made from."
        )
    check_not_inside(output, source)


def check_not_inside(output: Path, source: Path) -> None:
    """Raise ValueError for a file inside the folder of the clips, which would be newer than its index at once."""
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{output} lies in {source} itself; put it next to it, for example {source.resolve().name}{output.suffix}."
        )


def _entries(output: Path) -> dict[str, dict[str, Any]]:
    """The entries of the index that is there; none, with a warning, of one that cannot be read, which is made anew."""
    try:
        if not output.is_file():
            return {}
        index = MediaIndex(output)
        index.check_columns()
        return entries_of(index)
    except ValueError as error:
        warn_user(f"{error} All files are read again.")
        return {}

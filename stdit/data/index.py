"""An index: a table of media files in one file, with what was measured of each, which a run of any size opens at once."""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from stdit.conditions import ActionSpace
from stdit.data.base import Identity
from stdit.data.columns import Columns, annotation_values, write_columns
from stdit.data.facts import Facts
from stdit.data.folders import is_file, is_folder, resolved
from stdit.data.identity import content_of, relative_name
from stdit.data.manifest import FOLDER_MANIFESTS, Row, Table, folders_below, read_caption
from stdit.data.media import ask_for, place_of, state_of
from stdit.data.rates import LOOKED_AT
from stdit.data.records import is_table
from stdit.data.stores import files_below, is_remote, is_url, url_of

SUFFIX = ".index"
_VERSION = 1
# The columns of the size and the time of change of a file, and of the text next to it.
_FILE, _NOTE = ("bytes", "modified"), ("note_bytes", "note_modified")
_KEYS = ("root", "source", "state", "folders", "num_classes", "class_names")  # what every index has beside its columns
_COMPARED = 1000  # files whose size and time of change are compared when an index is opened


class MediaIndex(Sequence[Row]):
    """The rows of an index, made one by one as they are asked for; a copy in another process maps the same file.

    path: the file that `write_index` wrote. columns: those of the file, if it is open. root: the folder of the media, as it lies from the index. ValueError if the file
    is no index, is damaged or of another version.
    """

    def __init__(self, path: Path, columns: Columns | None = None):
        self.path = Path(path)
        try:
            self.columns = Columns(path) if columns is None else columns
        except ValueError as error:
            raise ValueError(f"{error}; make it again: stdit index SOURCE --output {path}.") from error
        self.info = self.columns.info
        if self.info.get("version") != _VERSION:
            raise ValueError(
                f"{path} is no index of version {_VERSION} (it has version {self.info.get('version')!r}); make it again: stdit "
                f"index SOURCE --output {path}."
            )
        if lacking := [name for name in _KEYS if name not in self.info]:
            raise ValueError(
                f"{path} is damaged (it does not say its {lacking[0]!r}); make it again: stdit index SOURCE --output {path}."
            )
        root = self._place_of("root")
        self.root = root if is_url(root) else root.absolute()

    @property
    def source(self) -> Path:
        """The folder or manifest that it was made from."""
        return self._place_of("source")

    def __reduce__(self) -> tuple[Callable[..., "MediaIndex"], tuple[Path, Columns, Any]]:
        return _reopened, (self.path, self.columns, self.info.get("fingerprint"))

    def _place_of(self, name: str) -> Path:
        """A place that is kept relative to the index, or as a URL."""
        place = Path(self.info[name])
        return place if is_url(place) else Path(os.path.normpath(self.path.parent / place))

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return Row(self.file(index), self.label(index), self.columns.text("caption", index), self.further(index))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def file(self, index: int) -> Path:
        """The file of a row."""
        return self.root / self.columns.text("path", index)

    def files(self) -> Iterator[str]:
        """The names of the files of all rows, without a `Path` for each, which takes ten times as long."""
        return (f"{self.root}{os.sep}{name}" for name in self.columns.texts("path"))

    def label(self, index: int) -> int | None:
        """The class of a row, None without classes."""
        label = int(self.columns["label"][index])
        return None if label < 0 else label

    def further(self, index: int) -> Mapping[str, Any]:
        """The further columns of a row."""
        text = self.columns.text("columns", index)
        return json.loads(text) if text else {}

    def values(self, column: str) -> Iterator[Any]:
        """The value of a column in every row: the label's name, the caption or a further column; None where it is missing."""
        return annotation_values(self.columns, column, self.info["class_names"])

    def facts(self, index: int) -> Facts | None:
        """What was measured of a file; None if it could not be read."""
        if not self.columns["frames"][index]:
            return None
        numbers = {name: self.columns[name][index].item() for name in Facts._fields if name != "codec"}
        return Facts(**numbers, codec=self.columns.text("codec", index))

    def refused(self, index: int) -> str | None:
        """Why a file cannot be read; None if it can."""
        return self.columns.text("refused", index) or None

    def changed(self, index: int) -> bool:
        """Whether a file, or the text next to it, is another than when it was measured, by size and time of change.

        In an index with hashes, one of the same size that was copied or touched is the same if its content is.
        """
        file = self.file(index)
        known = [tuple(int(self.columns[name][index]) for name in names) for names in (_FILE, _NOTE)]
        found = [state_of(file), _state_of_note(file)]
        content = self.columns.text("content", index)
        if known == found or not content or [size for size, _ in known] != [size for size, _ in found]:
            return known != found
        same_note = known[1] == found[1] or self._caption_beside(file) == self.columns.text("caption", index)
        return not same_note or (known[0] != found[0] and content != content_of(file))

    def _caption_beside(self, file: Path) -> str | None:
        """The text next to a file; None if it is none that can be a caption."""
        try:
            return read_caption(file.with_suffix(".txt"), resolved(self.root))
        except ValueError:
            return None

    def identity(self, index: int, *, read: bool = False) -> Identity:
        """The file below the root, its size (or, if it is read, a hash of its content), and its annotations."""
        _, label, caption, columns = self[index]
        content = content_of(self.file(index)) if read else int(self.columns["bytes"][index])
        return Identity(self.columns.text("path", index), content, label, caption, columns=columns, by_content=read)

    def shapes(self, fps: float | None) -> np.ndarray:
        """The (frames, height, width) of all files (N, 3), their frames counted at `fps`; (0, 1, 1) for what cannot be read."""
        frames, height, width = (np.asarray(self.columns[name], np.int64) for name in ("frames", "height", "width"))
        counted = frames
        if fps is not None:
            counted = np.where(frames > 1, (np.asarray(self.columns["last"]) * fps + 0.5).astype(np.int64) + 1, frames)
        read = frames > 0
        return np.stack([np.where(read, part, none) for part, none in ((counted, 0), (height, 1), (width, 1))], axis=1)

    @property
    def rates(self) -> list[float]:
        """The frame rates of a few of the clips, in rising order."""
        found = np.asarray(self.columns["fps"])[:: max(1, len(self) // LOOKED_AT)][:LOOKED_AT]
        return sorted(float(rate) for rate in found if rate > 0)

    @cached_property
    def action_space(self) -> ActionSpace | None:
        """The actions of the clips, None if they have none."""
        space = self.info.get("action_space")
        return None if space is None else ActionSpace.of(space, f"{self.path}: action_space")

    @property
    def table(self) -> Table:
        """The table of all rows."""
        return Table(self, self.info["num_classes"], self.info["class_names"])

    def check_columns(self) -> None:
        """Raise ValueError if the index is damaged."""
        try:
            self.columns.check()
        except ValueError as error:
            raise ValueError(f"{error}; make it again: {self._command(self._names)}.") from error

    def check(self, most: int = _COMPARED) -> None:
        """Raise ValueError if the index is damaged, or the source, an archive or one of `most` files spread over it has changed."""
        self.check_columns()
        source = self.source
        # An index does without its source, which may have been left elsewhere.
        state = state_of(source) if self.info["state"] is not None else (-1, -1)
        if state[0] >= 0 and list(state) != self.info["state"]:
            self._refuse(f"{source} has changed")
        folders = self.info["folders"]
        if folders is not None and is_folder(source) and folders != _folders_state(source):
            self._refuse(f"files of {source} were added, removed or renamed, or its own manifest has changed")
        # A store may have to be asked for each. More files are these and others, so that what is found current stays so.
        limits = {_COMPARED} if is_url(self.root) else {_COMPARED, most}
        spread = {i for limit in limits for i in range(0, len(self), max(1, -(-len(self) // limit)))}
        compared = spread.union(self._one_of_each_archive())
        ask_for(self.file(i) for i in compared)
        for i in sorted(compared):
            if self.changed(i):
                missing = "is missing" if state_of(self.file(i)) == (-1, -1) else "has changed"
                self._refuse(f"{self.file(i)} {missing}")

    def _one_of_each_archive(self) -> Iterator[int]:
        """A row in each of the archives or tables that the files lie in."""
        known = {""}
        for i, name in enumerate(self.columns.texts("path")):
            container = name.rpartition("/")[0].rpartition("@")[0] if "@" in name else ""  # of ARCHIVE@PLACE/NAME
            if container not in known:
                known.add(container)
                if place_of(name) is not None:  # a folder may have an @ in its name
                    yield i

    def check_names(self, columns: Mapping[str, str]) -> None:
        """Raise ValueError for names of columns (`data.columns`), if any, other than those that the index was made with."""
        if columns and dict(columns) != self._names:
            made = f"with data.columns={_written(self._names)}" if self._names else "without"
            raise ValueError(
                f"data.columns={_written(columns)} cannot change {self.path}, which was made {made}; leave it out, or make the index "
                f"again: {self._command(columns)}."
            )

    def _refuse(self, what: str) -> None:
        raise ValueError(
            f"{self.path} is older than its files ({what}); bring it up to date: {self._command(self._names)} (only what "
            "has changed is read)."
        )

    @property
    def _names(self) -> dict[str, str]:
        """The names of columns that the index was made with; none, also in older indexes, where they are the usual ones."""
        return (self.info.get("settings") or {}).get("columns") or {}

    def _command(self, names: Mapping[str, str]) -> str:
        """The command that makes the index again, with names of columns."""
        source, settings = self.source, self.info.get("settings") or {}
        words = ["stdit", "index", _address(source), "--output", str(self.path)]
        if self.root not in (source, source.absolute(), source.absolute().parent):
            words.append(f"data.root={_address(self.root)}")
        if settings.get("source") in ("images", "videos"):
            words.append(f"data.source={settings['source']}")
        if settings.get("pictures"):  # are clips of one frame
            words.append("data.sizes=[[1, 1, 1]]")
        if names:
            words.append(f"data.columns={_written(names)}")
        return shlex.join(words)


def _reopened(path: Path, columns: Columns, fingerprint: Any) -> MediaIndex:
    """A copy of an index; ValueError if it was opened by its name, and has other rows by now, which are not those of the run."""
    index = MediaIndex(path, columns)
    if index.info.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{path} was made again with other rows while a run reads it; start the run again, or name another data.index for each."
        )
    return index


def _folders_state(root: Path) -> str:
    """A hash of the folders below a root, with the times at which files were added to them, and of its own manifests."""
    digest = hashlib.sha256()
    if is_remote(root):  # folders have no times there
        digest.update(json.dumps(files_below(root)).encode())
        return digest.hexdigest()[:32]
    own = [root / name for name in FOLDER_MANIFESTS]
    own = [path for path in own if path.suffix != ".parquet" or path.is_file()]  # older indexes do not count it
    names = [*folders_below(root), *own]
    for path in names:
        digest.update(f"{relative_name(path, root)} {state_of(path)[1]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _written(names: Mapping[str, str]) -> str:
    """Names of columns as they are written on a command line."""
    return "{" + ", ".join(f"{name}: {column}" for name, column in names.items()) + "}"


def source_state(source: Path) -> dict[str, Any]:
    """What tells a changed source of an index, taken before its rows are read: its state, or that of the folders below it."""
    table = is_file(source) or is_table(source)
    return {
        "state": list(state_of(source)) if table else None,
        "folders": None if table else _folders_state(source),
    }


def note_states(rows: Sequence[Row]) -> np.ndarray:
    """The size and the time of change of the text next to each file (N, 2), taken before the files are read."""
    return np.array([_state_of_note(row.path) for row in rows], np.int64).reshape(-1, 2)


def _state_of_note(file: Path) -> tuple[int, int]:
    """The state of the text next to a file; of a store, which would be asked for each, none."""
    return (-1, -1) if is_remote(file) else state_of(file.with_suffix(".txt"))


def _address(path: Path) -> str:
    return url_of(path) if is_url(path) else str(path)


def _relative(path: Path, here: Path) -> str:
    return str(path) if is_remote(path) else os.path.relpath(path.absolute(), here)


def write_index(
    path: Path,
    table: Table,
    entries: Mapping[str, Mapping[str, Any]],
    *,
    source: Path,
    root: Path,
    fingerprint: Mapping[str, Any],
    action_space: ActionSpace | None,
    hashed: bool = False,
    settings: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
    notes: np.ndarray | None = None,
) -> None:
    """Write the index of a table.

    entries: by path, what `stdit check-media` measures: bytes, modified, and the fields of `Facts` or the reason "refused"; and
    the content's hash where it is known.
    source: the folder or manifest that the table was read from. root: the folder below which the files lie. fingerprint: that
    of the dataset. hashed: with a hash of every file's content. settings: what the rows depend on besides the source, as plain values.
    before, notes: what `source_state` and `note_states` gave before the files were read (default: what they give now).
    """
    here = Path(os.path.abspath(path)).parent
    rows = table.rows
    found = [entries[str(row.path)] for row in rows]
    numbers = {"frames": np.int32, "last": np.float64, "fps": np.float64, "height": np.int32, "width": np.int32}
    arrays: dict[str, Any] = {
        name: np.array([one.get(name, 0) for one in found], dtype) for name, dtype in numbers.items()
    }
    arrays |= {
        name: np.array([one.get(name, default) for one in found], dtype)
        for name, dtype, default in (("rotation", np.int16, 0), ("bytes", np.int64, -1), ("modified", np.int64, -1))
    }
    notes = note_states(rows) if notes is None else notes
    arrays |= {name: notes[:, i] for i, name in enumerate(_NOTE)}
    arrays["label"] = np.array([-1 if row.label is None else row.label for row in rows], np.int32)
    arrays |= {
        "path": (relative_name(row.path, root) for row in rows),
        "caption": (row.caption for row in rows),
        "columns": (json.dumps(row.columns, default=str) if row.columns else "" for row in rows),
        "codec": (one.get("codec", "") for one in found),
        "refused": (one.get("refused", "") for one in found),
        "content": (_content(row.path, one) if hashed else "" for row, one in zip(rows, found, strict=True)),
    }
    info = {
        "version": _VERSION,
        "root": _relative(root, here),
        "source": _relative(source, here),
        **(source_state(source) if before is None else before),
        "num_classes": table.num_classes,
        "class_names": table.class_names,
        "action_space": None if action_space is None else action_space.plain,
        "fingerprint": dict(fingerprint),
        "settings": None if settings is None else dict(settings),
    }
    write_columns(path, arrays, info)


def _content(path: Path, entry: Mapping[str, Any]) -> str:
    """The hash of a file; empty for one that has changed since it was read, which is known by its time then."""
    if entry.get("content"):
        return entry["content"]
    content = content_of(path) or ""
    return content if state_of(path) == tuple(entry.get(name, -1) for name in _FILE) else ""


def entries_of(index: MediaIndex) -> dict[str, dict[str, Any]]:
    """The entries that an index was written from, by path, so that only files which have changed are read again."""
    found = {}
    for i in range(len(index)):
        file = str(index.file(i))
        facts, refused = index.facts(i), index.refused(i)
        entry: dict[str, Any] = {"path": file, **{name: int(index.columns[name][i]) for name in _FILE}}
        if content := index.columns.text("content", i):
            entry["content"] = content
        found[file] = entry | (facts._asdict() if facts is not None else {"refused": refused or "was not read"})
    return found

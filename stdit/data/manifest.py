"""Manifests and folders of media files, read as one table of paths, labels and captions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.folders import is_file, is_folder, names_in, resolved, walk
from stdit.data.labels import Classes, number_classes
from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ask_for, container_of, is_one_of, open_regular, state_of
from stdit.data.records import Record, is_table, missing_path, read_records
from stdit.data.stores import is_remote, is_url, url_of
from stdit.warn import warn_user

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Row", "Table", "find_media", "read_manifest", "scan_folder"]

# Files of the hub's convention that list a folder's media.
FOLDER_MANIFESTS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Folders that systems and network storage put among a person's own; folders that begin with a dot are as well.
_SYSTEM_FOLDERS = {
    "@eaDir", "@tmp", "@__thumb", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information",
    "lost+found", "__MACOSX", "__pycache__",
}  # fmt: skip
_MAX_CAPTION_BYTES = 1 << 16


class Row(NamedTuple):
    """One media file of a table.

    label: a class index, None without classes. columns: the further columns of the manifest.
    """

    path: Path
    label: int | None
    caption: str = ""
    columns: Mapping[str, Any] = {}


class Table(NamedTuple):
    """A table of media files.

    num_classes: 0 for data without labels. class_names: None if the labels are numbers.
    """

    rows: Sequence[Row]
    num_classes: int
    class_names: list[str] | None


def read_manifest(path: Path, root: Path | None = None, columns: Mapping[str, str] | None = None) -> Table:
    """Read JSON lines or CSV with a column `path` and optionally `label` (a number or a name) and `caption`.

    Other usual names of these columns are known (`records.COLUMNS`). Without a column of captions, the text file next to
    a clip (a.txt next to a.mp4) is its caption. Paths are relative to the manifest and must stay under `root` (default:
    the manifest's folder). columns: those that are path, label and caption, where they have other names. Raises ValueError
    with the line and a remedy.
    """
    path = Path(path)
    if not (is_file(path) or is_table(path)):
        raise ValueError(f"data.manifest={str(path)!r} does not exist; give a .jsonl, .csv or .parquet file.")
    records = read_records(path, columns)
    # Rows that lie here may name files of a store by their place below its URL.
    base = Path(root) if root and is_remote(root) and not is_remote(path) else path.parent
    return table_of(records, path, base, allowed=Path(root) if root else path.parent)


def table_of(records: Sequence[Record], path: Path, base: Path, *, allowed: Path) -> Table:
    """The table of rows that were read from `path`, with paths relative to `base` that must stay under `allowed`."""
    if not records:
        raise ValueError(f"{path} has no rows; write one line per clip.")
    allowed = resolved(allowed)
    place = _Place(path, base, allowed)
    files = [place.file_of(record) for record in records]
    ask_for(files)
    if any("caption" in record.values for record in records):
        captions = [_caption_of(record, path) for record in records]
    else:
        captions = _captions_next_to(files, allowed)
    classes = _classes_of(records, path)
    rows = [
        Row(file, label, caption, _further(record))
        for file, label, caption, record in zip(files, classes.indices, captions, records, strict=True)
    ]
    return Table(rows, classes.num_classes, classes.names)


class _Place:
    """Where the files of a manifest lie. Folders are resolved once each, since resolving every path takes minutes for a million."""

    def __init__(self, manifest: Path, base: Path, allowed: Path):
        self.manifest, self.base, self.allowed = manifest, base, allowed
        self._resolved: dict[str, str] = {}  # folders -> what they are without links

    def file_of(self, record: Record) -> Path:
        """The file of a row, resolved; a path with the backslashes of Windows is read as one with slashes."""
        place, given = f"{self.manifest}, line {record.line}", record.values.get("path")
        if not isinstance(given, str):
            raise ValueError(f"{place}: {missing_path(record.values)}; every row needs one.")
        if not given.strip():
            raise ValueError(f"{place}: the path is empty; every row needs one.")
        try:
            kept = is_remote(self.base) or container_of(given) is not None
            if "\\" in given and not (kept or (self.base / given).exists()):
                given = given.replace("\\", "/")
            file = self._resolve(given)
            os.fsencode(file)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{place}: {given!r} is not a path ({error}); correct it.") from error
        if not file.is_relative_to(self.allowed):
            raise ValueError(
                f"{place}: {given!r} leads outside data.root={str(self.allowed)!r} (paths are relative to {self.base}); "
                f"{'set data.root to the URL that it begins with' if is_url(given) else 'move the file, or set data.root to a folder that holds it'}."
            )
        return file

    def _resolve(self, given: str) -> Path:
        joined = given if is_url(given) else os.path.join(self.base, given)
        if is_url(joined):  # also one that may not be read, which lies nowhere here
            return Path(os.path.normpath(joined))
        if (container := container_of(joined)) is not None:
            # The name of the archive is kept: the hub's cache has links to files without suffixes.
            return Path(str(self._without_links(container, last=False)) + joined[len(container) :])
        return self._without_links(joined)

    def _without_links(self, path: str, last: bool = True) -> Path:
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return Path(path).resolve()
        if folder not in self._resolved:
            self._resolved[folder] = str(Path(folder).resolve())
        file = Path(self._resolved[folder], name)
        return file.resolve() if last and os.path.islink(file) else file  # a name too long for a file is no link


def _caption_of(record: Record, manifest: Path) -> str:
    caption = record.values.get("caption")
    place = f"{manifest}, line {record.line}"
    if caption is None:
        return ""
    if not isinstance(caption, str):
        raise ValueError(f"{place}: caption {caption!r} is not text; write one text per row, in quotation marks.")
    return as_utf8(caption, place)


def as_utf8(caption: str, place: str) -> str:
    """A caption; ValueError, which names its place, if it has no form in UTF-8."""
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: the caption {caption!r} is not text ({error.reason}); correct it.") from error
    return caption


def _classes_of(records: Sequence[Record], manifest: Path) -> Classes:
    labels = [record.values.get("label") for record in records]
    missing = [label is None or (isinstance(label, str) and not label.strip()) for label in labels]
    if all(missing):
        return Classes([None] * len(labels), 0, None)
    if any(missing):
        line = records[missing.index(True)].line
        path = records[missing.index(True)].values["path"]
        raise ValueError(
            f"{manifest}, line {line} ({path}) has no label, but other rows have one; label every row, or none."
        )
    return number_classes(labels, lambda i: f"{manifest}, line {records[i].line}")


def _further(record: Record) -> dict[str, Any]:
    """The columns other than path, label and caption."""
    return {name: value for name, value in record.values.items() if name not in ("path", "label", "caption")}


class Found(NamedTuple):
    """What a walk through a folder found: media files, and what was left out of them (for messages)."""

    files: list[Path]
    left_out: str


def scan_folder(root: Path, suffixes: set[str], what: str, columns: Mapping[str, str] | None = None) -> Table:
    """Find all files below `root` with one of `suffixes`; if they are in folders, the top folder's name is the label.

    A text file next to a clip is its caption; a `metadata.jsonl` or `metadata.csv` in `root` is read as its manifest.
    Hidden folders, and those of the system, are left out; so are links that lead outside `root`, with a warning.
    what: the noun for such files in messages ("videos"). columns: those of its manifest, as in `read_manifest`. Raises
    ValueError if there are no files, if only some are in folders, or if columns are named and there is no manifest.
    """
    root = Path(root)
    if not is_folder(root):
        if is_remote(root):
            raise ValueError(
                f"data.root={url_of(root)!r} has no files in its store; check the name, or put {what} there."
            )
        raise ValueError(
            f"data.root={str(root)!r} does not exist; give a folder of {what}, or use generated clips of moving "
            "shapes: data.source=shapes."
        )
    found, left_out = find_media(root, suffixes)
    for name in FOLDER_MANIFESTS:
        if is_file(root / name) and _is_inside(root / name, resolved(root)):
            return _listed(root, read_manifest(root / name, root, columns), found, what=what, manifest=root / name)
    if columns:
        raise ValueError(
            f"data.root={str(root)!r} has no columns (data.columns.{next(iter(columns))}), since it is a folder without a "
            "manifest; give data.manifest, or leave data.columns out."
        )
    if not found:
        also = f"; {left_out}" if left_out else ""
        raise ValueError(
            f"data.root={str(root)!r} holds no {what} ({', '.join(sorted(suffixes))}){also}; put some there or give "
            "another folder."
        )
    if left_out:
        warn_user(f"data.root={str(root)!r}: {left_out}.")
    captions = _captions_next_to(found, resolved(root))
    classes = _classes_of_folders(root, found, what)
    rows = [Row(*row) for row in zip(found, classes.indices, captions, strict=True)]
    missing = captions.count("")
    if 0 < missing < len(captions):
        first = found[captions.index("")]
        warn_user(
            f"data.root={str(root)!r}: {missing} of {len(rows)} {what} have no caption in a text file of their name, "
            f"such as {first.with_suffix('.txt').name!r}; theirs is empty."
        )
    return Table(rows, classes.num_classes, classes.names)


def _listed(root: Path, table: Table, found: Sequence[Path], *, what: str, manifest: Path) -> Table:
    """The table of a folder's own manifest, with a warning of files that are not in it."""
    inside = {row.path for row in table.rows}
    missing = [file for file in found if resolved(file) not in inside]
    if missing:
        warn_user(
            f"{manifest} does not list {len(missing)} of the {len(found)} {what} in its folder (the first: "
            f"{missing[0].name!r}); they are left out."
        )
    folders = {file.relative_to(root).parts[0] for file in found if file.parent != root}
    if not table.num_classes and len(folders) > 1:
        warn_user(
            f"{manifest} has no column 'label', so that the {len(folders)} folders next to it are no classes; add that "
            "column, or rename the file to have the folders as classes and no captions of it."
        )
    return table


def _classes_of_folders(root: Path, files: Sequence[Path], what: str) -> Classes:
    """The classes that the folders just below `root` are; none if the files lie in `root` itself."""
    parts = [file.relative_to(root).parts for file in files]
    nested = [len(p) > 1 for p in parts]
    if not any(nested):
        return Classes([None] * len(files), 0, None)
    if not all(nested):
        loose = files[nested.index(False)]
        raise ValueError(
            f"data.root={str(root)!r} has {what} both in class folders and loose ({loose.name!r}); put all of them in "
            "folders, or none."
        )
    return number_classes([p[0] for p in parts], lambda i: f"the folder {str(root / parts[i][0])!r}")


def find_media(root: Path, suffixes: set[str]) -> Found:
    """All files with one of `suffixes`, in order, without what is hidden and without links that lead outside."""
    allowed = resolved(root)
    if allowed == Path(allowed.anchor):
        raise ValueError(f"{str(root)!r} is the whole file system; give the folder of the clips.")
    found: list[Path] = []
    links: list[Path] = []
    unreadable: list[OSError] = []
    for folder, folders, files in walk(root, unreadable.append):
        folders[:] = _visited(folders)
        links += [Path(folder, name) for name in folders if not _is_inside(Path(folder, name), allowed)]
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and is_one_of(file, suffixes):
                (found if _is_inside(file, allowed) else links).append(file)
    reasons = []
    if links:
        reasons.append(
            f"{len(links)} link(s) lead outside it and are left out (the first: {links[0].name!r}); copy the files "
            "(from the hub: hf download --local-dir), or list them in a manifest and set data.root to a folder that "
            "holds links and files"
        )
    if unreadable:
        reasons.append(
            f"{len(unreadable)} folder(s) cannot be read and are left out (the first: {unreadable[0]}); change their "
            "permissions"
        )
    return Found(found, ". ".join(reasons))


def _visited(names: Sequence[str]) -> list[str]:
    """The folders among which files are looked for: neither hidden nor of the system."""
    return sorted(name for name in names if not name.startswith(".") and name not in _SYSTEM_FOLDERS)


def folders_below(root: Path) -> list[Path]:
    """The folders in which `find_media` looks for files, in order."""
    found = []
    for folder, folders, _ in walk(root):
        folders[:] = _visited(folders)
        found.append(Path(folder))
    return found


def _is_inside(path: Path, allowed: Path) -> bool:
    """Whether a path is no link, or a link that stays under `allowed`."""
    if not path.is_symlink():
        return True
    try:
        return path.resolve().is_relative_to(allowed)
    except (OSError, RuntimeError):  # a link to itself: what opens the file says so
        return True


def _captions_next_to(files: Sequence[Path], allowed: Path) -> list[str]:
    """The caption of each file: the text of the file of its name with the suffix .txt, empty if there is none."""
    names: dict[Path, dict[str, str]] = {}  # by folder: name of a text file without its suffix -> its full name
    for folder in {file.parent for file in files if container_of(file) is None}:
        names[folder] = {name[:-4]: name for name in names_in(folder) if name.lower().endswith(".txt")}
    return [
        read_caption(file.parent / names[file.parent][file.stem], allowed)
        if file.stem in names.get(file.parent, ())
        else ""
        for file in files
    ]


def read_caption(file: Path, allowed: Path) -> str:
    """The text of a file, empty without one and of a link that leads out of `allowed`; ValueError if it is no short text."""
    if not is_file(file) or not _is_inside(file, allowed):
        return ""
    size = state_of(file)[0]
    if size > _MAX_CAPTION_BYTES:
        raise ValueError(
            f"{str(file)!r} is too long for a caption ({size} bytes, at most {_MAX_CAPTION_BYTES}); shorten or rename it."
        )
    try:
        with open_regular(file) as stream:
            return stream.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not text in UTF-8 ({error}); save the caption as UTF-8.") from error

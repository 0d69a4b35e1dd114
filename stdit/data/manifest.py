"""Manifests and folders of media files, read as one table of paths, labels and captions."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_one_of

__all__ = ["IMAGE_SUFFIXES", "VIDEO_SUFFIXES", "Row", "Table", "read_manifest", "scan_folder"]


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

    rows: list[Row]
    num_classes: int
    class_names: list[str] | None


class _Entry(NamedTuple):
    """A row of a manifest, with the label as written there."""

    line: int
    path: Path
    label: Any
    caption: str
    columns: Mapping[str, Any] = {}

    def row(self, label: int | None) -> Row:
        """The row of a table, with a class index as its label."""
        return Row(self.path, label, self.caption, self.columns)


def read_manifest(path: Path, root: Path | None = None) -> Table:
    """Read JSON lines or CSV with a column `path` and optionally `label` (a number or a name) and `caption`.

    Paths are relative to the manifest and must stay under `root` (default: the manifest's folder). Raises ValueError
    with the line and a remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.manifest={str(path)!r} does not exist; give a .jsonl or .csv file.")
    entries = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    allowed = (Path(root) if root else path.parent).resolve()
    rows = []
    for number, entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            found = f"it has {sorted(entry)}" if isinstance(entry, dict) else "it is not an object"
            raise ValueError(f"{path}, line {number}: the column 'path' is missing ({found}); every row needs one.")
        try:
            file = (path.parent / entry["path"]).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}, line {number}: {entry['path']!r} is not a path ({error}); correct it."
            ) from error
        if not file.is_relative_to(allowed):
            raise ValueError(
                f"{path}, line {number}: {entry['path']!r} leads outside data.root={str(allowed)!r}; "
                "move the file, or set data.root to a folder that holds it."
            )
        rows.append(_Entry(number, file, entry.get("label"), entry.get("caption") or "", columns=_further(entry)))
    if not rows:
        raise ValueError(f"{path} has no rows; write one line per clip.")
    return _with_class_indices(path, rows)


def _further(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns other than path, label and caption."""
    return {name: value for name, value in entry.items() if name not in ("path", "label", "caption")}


def scan_folder(root: Path, suffixes: set[str], what: str) -> Table:
    """Find all files below `root` with one of `suffixes`; if they are in folders, the top folder's name is the label.

    what: the noun for such files in messages ("videos"). Raises ValueError if there are none, or if only some are in
    folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"data.root={str(root)!r} does not exist; give a folder of {what}, or use generated clips of moving "
            "shapes: data.source=shapes."
        )
    allowed, found = root.resolve(), []
    for folder, folders, files in os.walk(root):  # links to folders are not followed: they may form a loop
        folders.sort()
        for name in sorted(files):
            file = Path(folder) / name
            escapes = file.is_symlink() and not file.resolve().is_relative_to(allowed)
            if not name.startswith(".") and not escapes and is_one_of(file, suffixes):
                found.append(file)
    if not found:
        raise ValueError(
            f"data.root={str(root)!r} holds no {what} ({', '.join(sorted(suffixes))}); put some there or give another "
            "folder."
        )
    parts = [file.relative_to(root).parts for file in found]
    nested = [len(p) > 1 for p in parts]
    if any(nested) and not all(nested):
        loose = found[nested.index(False)]
        raise ValueError(
            f"data.root={str(root)!r} has {what} both in class folders and loose ({loose.name!r}); put all of them in "
            "folders, or none."
        )
    if not any(nested):
        return Table([Row(file, None) for file in found], 0, None)
    names = sorted({p[0] for p in parts})
    return Table([Row(file, names.index(p[0])) for file, p in zip(found, parts, strict=True)], len(names), names)


def _csv_rows(path: Path) -> list[tuple[int, Any]]:
    """(line number, row as a dictionary) of a CSV file."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if "path" not in (reader.fieldnames or []):
                raise ValueError(
                    f"{path}: the column 'path' is missing (it has {reader.fieldnames}); name it in the first line."
                )
            return [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one.") from error


def _json_rows(path: Path) -> list[tuple[int, Any]]:
    """(line number, parsed value) of every line of a JSON lines file that is not blank."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as JSON lines.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); write one object per line.") from error
    return rows


def _with_class_indices(path: Path, entries: list[_Entry]) -> Table:
    """Turn labels into class indices: numbers are used as they are; if any label is a name, all count as names.

    Names are numbered in alphabetical order.
    """
    labelled = [entry.label is not None and entry.label != "" for entry in entries]
    if not any(labelled):
        return Table([entry.row(None) for entry in entries], 0, None)
    if not all(labelled):
        line = entries[labelled.index(False)].line
        raise ValueError(f"{path}, line {line} has no label, but other rows have one; label every row, or none.")
    for entry in entries:
        if isinstance(entry.label, bool | float | list | dict):
            raise ValueError(
                f"{path}, line {entry.line}: label {entry.label!r} is neither a whole number nor a name; correct it."
            )
    values = [str(entry.label).strip() for entry in entries]
    if all(value.removeprefix("-").isdecimal() for value in values):
        numbers = [int(value) for value in values]
        if min(numbers) < 0:
            line = entries[numbers.index(min(numbers))].line
            raise ValueError(f"{path}, line {line}: label {min(numbers)} is negative; number the classes from 0.")
        rows = [entry.row(number) for number, entry in zip(numbers, entries, strict=True)]
        return Table(rows, max(numbers) + 1, None)
    names = sorted(set(values))
    rows = [entry.row(names.index(value)) for value, entry in zip(values, entries, strict=True)]
    return Table(rows, len(names), names)

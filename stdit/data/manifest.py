"""Which files there are, and what they are called: manifests and folders become one table of rows."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

VIDEO_SUFFIXES = {
    ".mp4",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".flv",
    ".ts",
    ".mpg",
    ".mpeg",
    ".m4v",
    ".3gp",
    ".ogv",
    ".gif",
    ".wmv",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Row(NamedTuple):
    """A clip of a table; columns: what the manifest says of it besides path, label and caption."""

    path: Path
    label: int | None
    caption: str = ""
    columns: Mapping[str, Any] = {}


class Table(NamedTuple):
    """Rows, the number of classes (0: unconditional) and their names, if they have any."""

    rows: list[Row]
    num_classes: int
    class_names: list[str] | None


def read_manifest(path: Path, root: Path | None = None) -> Table:
    """JSON lines or CSV with a column `path`, and perhaps `label` (a number or a name) and `caption`.

    Paths resolve from the manifest and stay under `root` (default: its folder). ValueError names row and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"data.manifest={str(path)!r} does not exist; give a .jsonl or .csv file.")
    entries = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path)
    inside = (Path(root) if root else path.parent).resolve()
    rows = []
    for number, entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            has = f"it has {sorted(entry)}" if isinstance(entry, dict) else "it is no object"
            raise ValueError(f"{path}, line {number}: the column 'path' is missing ({has}); every row needs one.")
        try:
            file = (path.parent / entry["path"]).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}, line {number}: {entry['path']!r} is no path ({error}); correct it.") from error
        if not file.is_relative_to(inside):
            raise ValueError(
                f"{path}, line {number}: {entry['path']!r} leads outside data.root={str(inside)!r}; move the file or the root."
            )
        rows.append((number, file, entry.get("label"), entry.get("caption") or "", further(entry)))
    if not rows:
        raise ValueError(f"{path} has no rows; write one line a clip.")
    return _labelled(path, rows)


def further(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that are neither path, label nor caption."""
    return {name: value for name, value in entry.items() if name not in ("path", "label", "caption")}


def scan_folder(root: Path, suffixes: set[str], what: str) -> Table:
    """All files below `root` with one of `suffixes`. If they lie in folders, the first folder's name is the label."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(
            f"data.root={str(root)!r} does not exist; give a folder of {what}, or try it on shapes drawn as it goes: "
            "data.source=shapes."
        )
    inside, found = root.resolve(), []
    for folder, folders, files in os.walk(root):  # does not follow links to folders, which may be endless
        folders.sort()
        for name in sorted(files):
            file = Path(folder) / name
            leads_out = file.is_symlink() and not file.resolve().is_relative_to(inside)
            if file.suffix.lower() in suffixes and not name.startswith(".") and not leads_out:
                found.append(file)
    if not found:
        raise ValueError(
            f"data.root={str(root)!r} holds no {what} ({', '.join(sorted(suffixes))}); put some there or name another folder."
        )
    parts = [file.relative_to(root).parts for file in found]
    nested = [len(p) > 1 for p in parts]
    if any(nested) and not all(nested):
        stray = found[nested.index(False)]
        raise ValueError(
            f"data.root={str(root)!r} has {what} both in class folders and loose ({stray.name!r}); put all in folders, or none."
        )
    if not any(nested):
        return Table([Row(file, None) for file in found], 0, None)
    names = sorted({p[0] for p in parts})
    return Table([Row(file, names.index(p[0])) for file, p in zip(found, parts, strict=True)], len(names), names)


def _csv_rows(path: Path):
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


def _json_rows(path: Path):
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
                raise ValueError(f"{path}, line {number} is not JSON ({error}); write one object a line.") from error
    return rows


def _labelled(path: Path, rows: list) -> Table:
    """Numbers stay numbers; if any label is a name, all are names, numbered in alphabetical order."""
    given = [label is not None and label != "" for _, _, label, *_ in rows]
    if not any(given):
        return Table([Row(file, None, *rest) for _, file, _, *rest in rows], 0, None)
    if not all(given):
        number = rows[given.index(False)][0]
        raise ValueError(f"{path}, line {number} has no label though others have; label every row, or none.")
    for number, _, label, *_ in rows:
        if isinstance(label, bool | float | list | dict):
            raise ValueError(
                f"{path}, line {number}: label {label!r} is neither a whole number nor a name; correct it."
            )
    values = [str(label).strip() for _, _, label, *_ in rows]
    if all(value.removeprefix("-").isdecimal() for value in values):
        numbers = [int(value) for value in values]
        if min(numbers) < 0:
            row = rows[numbers.index(min(numbers))]
            raise ValueError(f"{path}, line {row[0]}: label {min(numbers)} is negative; labels begin at 0.")
        labelled = [Row(file, n, *rest) for n, (_, file, _, *rest) in zip(numbers, rows, strict=True)]
        return Table(labelled, max(numbers) + 1, None)
    names = sorted(set(values))
    labelled = [Row(file, names.index(v), *rest) for v, (_, file, _, *rest) in zip(values, rows, strict=True)]
    return Table(labelled, len(names), names)

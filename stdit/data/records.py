"""CSV and JSON lines as people have them: rows as dictionaries, with the columns path, label and caption recognised."""

import codecs
import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stdit.conditions import CONDITIONERS
from stdit.data.arrow_tables import TABLES, given_of_rows, read_table
from stdit.data.media import open_regular
from stdit.files import write_text
from stdit.warn import warn_user

# The names that other projects and hubs give to the three columns that every manifest may have.
COLUMNS = {
    "path": (
        "path", "file_name", "filename", "file_path", "filepath", "media_path", "video", "video_path", "video_file",
        "image", "image_path", "image_file",
    ),
    "caption": ("caption", "text", "prompt", "description"),
    "label": ("label", "class", "class_name", "category"),
}  # fmt: skip
_LISTED = 8  # columns named in a message
_ROLES = {name: role for role, names in COLUMNS.items() for name in names}
# Words in the names of columns that say what a file is, not what it shows: they are no mistake if nothing reads them.
_FACTS = {
    "aes", "aesthetic", "aspect", "bytes", "codec", "container", "duration", "end", "fmt", "format", "fps", "frame",
    "frames", "group", "hash", "height", "id", "index", "kind", "licence", "license", "match", "md5", "motion",
    "note", "ocr", "environment", "info", "rate", "refused", "seed", "ratio", "relpath", "resolution", "reward", "rotation", "scene", "score", "seconds", "session", "sha",
    "sha256", "size", "source", "space", "split", "start", "subject", "time", "timestamp", "truth", "url", "versions", "vfr", "width",
}  # fmt: skip


class Record(NamedTuple):
    """One row of a manifest: its line number, and its values by column, under the names path, label and caption too."""

    line: int
    values: dict[str, Any]


def read_records(path: Path, given: Mapping[str, str] | None = None) -> list[Record]:
    """Read a CSV file (`.csv`, `.tsv`), a table (`.parquet`, `.arrow`, `.lance`), or JSON lines (any other suffix).

    Byte-order marks, Windows line ends, other separators and other names of the columns (`COLUMNS`) are recognised; a
    column that nothing reads is named in a warning. Raises ValueError with the line and a remedy. given: the columns that are
    path, label and caption, by these names, for those that have others.
    """
    rows = read_rows(path, given)
    return as_records(rows, path, given_of_rows(given, [row for _, row in rows]) if _is_typed(path) else given)


def as_records(rows: Sequence[tuple[int, dict[str, Any]]], path: Path, given: Mapping[str, str] | None) -> list[Record]:
    """The records of numbered rows, of which `path` is named in messages and warnings; as `read_records`."""
    columns = {name: None for _, row in rows for name in row}
    roles = find_columns(columns, str(path), given)
    if rows and "path" not in roles.values():
        raise ValueError(f"{path}, line {rows[0][0]}: {missing_path(columns)}; every row needs one.")
    _warn_of_unknown(path, [name for name in columns if name not in roles])
    return [Record(line, row | {roles[name]: row[name] for name in row if name in roles}) for line, row in rows]


def is_table(path: Path) -> bool:
    """Whether a path is that of a table that is a folder, as those of Lance are."""
    return path.suffix.lower() == ".lance" and path.is_dir()


def _is_typed(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def read_rows(path: Path, given: Mapping[str, str] | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The line number of every row of such a file, and its values under the names that they have there."""
    if _is_typed(path):
        return list(enumerate(read_table(path, given), 1))
    text = _read_text(path)
    return _csv_rows(path, text, given) if path.suffix.lower() in (".csv", ".tsv") else _json_rows(path, text)


def find_columns(
    names: Iterable[str], what: str, given: Mapping[str, str] | None = None, *, but: Iterable[str] = ()
) -> dict[str, str]:
    """The columns that are path, label and caption: name -> which of the three; a column of just that name goes first.

    Raises ValueError if two others could be the same one. given: the column of each of the three that was named; ValueError
    if there is none of that name. but: of the three, those that no column is guessed for.
    """
    names = list(names)
    found: dict[str, str] = {}
    for role, column in (given or {}).items():
        if role not in COLUMNS:
            raise ValueError(f"data.columns has {role!r}; name the columns of {', '.join(COLUMNS)}.")
        if names and column not in names:
            raise ValueError(f"{what} has no column {column!r} (data.columns.{role}); it has {listed(names)}.")
        found[column] = role
    for role in COLUMNS.keys() - (given or {}).keys() - set(but):
        candidates = [name for name in names if _ROLES.get(_plain(name)) == role and name not in found]
        exact = [name for name in candidates if name == role] or [n for n in candidates if _plain(n) == role]
        chosen = exact or candidates
        if len(chosen) > 1:
            raise ValueError(
                f"{what}: the columns {listed(chosen)} could each be the {role}; rename the right one {role!r}."
            )
        found |= {name: role for name in chosen}
    return found


def nearest_column(name: str) -> str | None:
    """The known column whose name is most like `name`; None if none is."""
    close = difflib.get_close_matches(_plain(name), [*_ROLES, *CONDITIONERS], n=1, cutoff=0.7)
    return close[0] if close else None


def missing_path(names: Iterable[str]) -> str:
    """The reason for refusing rows without a path: the columns there are, and the one that may be meant."""
    names = list(names)
    like = [name for name in names[:_LISTED] if nearest_column(name) in COLUMNS["path"]]
    hint = f"; {like[0]!r} looks like it" if like else ""
    return f"the column 'path' is missing (it has {listed(names)}{hint})"


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(repr(name[:60]) for name in names[:_LISTED]) + more if names else "none"


def _warn_of_unknown(path: Path, names: Sequence[str]) -> None:
    unknown = [n for n in names if n not in CONDITIONERS and _plain(n) not in _ROLES and not _is_fact(n)]
    if unknown:
        close = [f"{name!r} looks like {like!r}" for name in unknown[:_LISTED] if (like := nearest_column(name))]
        hint = f" ({', '.join(close)})" if close else ""
        warn_user(
            f"{path}: nothing reads the columns {listed(unknown)}{hint}; rename what is a path, label or caption. The "
            "others reach conditions of those names only."
        )


def _is_fact(name: str) -> bool:
    return not _FACTS.isdisjoint(_plain(name).split("_"))


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            data = stream.read()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8.") from error


def write_records(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV (`.csv`) or JSON lines (any other suffix) that `read_records` reads back."""
    if path.suffix.lower() != ".csv":
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list({name: None for row in rows for name in row}), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(v) if isinstance(v, list | dict) else v for name, v in row.items()})
    write_text(path, text.getvalue())


def _csv_rows(path: Path, text: str, given: Mapping[str, str] | None) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of a CSV text, separated by what separates its first line."""
    first = text.partition("\n")[0]
    separator = max(",;\t|", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows = []
    try:
        header = [name.strip() for name in next(reader, [])]
        doubled = [name for name, count in Counter(filter(None, header)).items() if count > 1]
        if doubled:
            raise ValueError(f"{path}: the column {doubled[0]!r} is there twice; rename one of them.")
        if "path" not in find_columns(filter(None, header), str(path), given).values():
            raise ValueError(f"{path}: {missing_path(filter(None, header))}; name the columns in the first line.")
        for cells in reader:
            if any(cells[len(header) :]):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(cells)} cells for {len(header)} columns; put quotation marks "
                    f"around a text with {separator!r} in it."
                )
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, {name: cell for name, cell in zip(header, cells, strict=False) if name}))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} is not CSV ({error}); close every quotation mark, and double those in a text."
        ) from error
    return rows


def _json_rows(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of every line that is not blank; the line separators of Unicode are part of a text, not its end.

    A text that is one JSON list is read too, its items as lines.
    """
    if text.lstrip().startswith("[") and (items := _json_list(text)) is not None:
        return [(number, _as_row(path, number, item)) for number, item in enumerate(items, 1)]
    rows = []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); write one object per line.") from error
        rows.append((number, _as_row(path, number, row)))
    return rows


def _json_list(text: str) -> list[Any] | None:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # the message of the line that is wrong says more
        return None


def _as_row(path: Path, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}, line {number} is no row: it is not an object; write one object per line.")
    return value

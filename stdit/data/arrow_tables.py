"""Rows of tables with types: parquet and Arrow files, and tables of Lance; clips inside them are named by their place.

A clip is a path, or bytes in a column, as the library `datasets` keeps them (bytes and a name) or plain. Bytes are not read
here: where the file is not packed they are a part of it, FILE.arrow@OFFSET+SIZE/NAME, otherwise a cell,
TABLE.parquet@COLUMN[ROW]/NAME, which `media.open_regular` opens.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from stdit.data.cells import guarded, open_lance, open_parquet
from stdit.data.packages import package, pyarrow_of

TABLES = (".parquet", ".arrow", ".lance")
_ROWS = 4096  # read at a time
_LISTED = 8  # columns named in a message
_LOOKED_AT = 8  # rows at the beginning of a group of rows
_PATH = "path"


def read_table(path: Path, given: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table as plain values, without those that are null; a column of media becomes the column path.

    given: the column of media under "path", for a table with several. ValueError with a remedy.
    """
    if path.suffix.lower() == ".lance":
        yield from _lance_table(path, given or {})
        return
    arrow = pyarrow_of("parquet")
    rows = _parquet_rows if path.suffix.lower() == ".parquet" else _arrow_rows
    try:
        yield from rows(path, given or {})
    except (arrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        kind = path.suffix.lower().removeprefix(".")
        raise ValueError(f"{path} is not a {kind} file that pyarrow reads ({first}); write it again.") from error


def given_of_rows(given: Mapping[str, str] | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The given columns of rows of a table, in which a column of media has become the column path."""
    return {role: name for role, name in (given or {}).items() if role != _PATH or any(name in row for row in rows)}


def _parquet_rows(path: Path, given: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    file = open_parquet(str(path))
    schema = file.schema_arrow
    media = _media_of(schema, path, given)
    plain = [name for name in schema.names if not _holds_bytes(schema.field(name).type)]
    named = [f"{media}.path"] if media and _is_named(schema.field(media).type) else []
    inside = media is not None and (not named or _has_bytes(file, media, path))
    names, start = _class_names(schema), 0
    if not plain + named:  # nothing else tells how many rows there are
        for row in range(file.metadata.num_rows):
            yield {_PATH: _cell(path, media, row, None)}
        return
    for batch in file.iter_batches(_ROWS, columns=plain + named):
        for i, row in enumerate(batch.to_pylist()):
            name = (row.pop(media, None) or {}).get("path") if named else None
            clip = {} if media is None else {_PATH: _cell(path, media, start + i, name) if inside else name}
            yield _plain(row, clip, names)
        start += len(batch)


def _arrow_rows(path: Path, given: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    arrow = package("pyarrow", "parquet", "Arrow files")
    whole = arrow.memory_map(str(path)).read_buffer()
    try:
        reader = arrow.ipc.open_stream(whole)
        batches: Iterator[Any] = iter(reader)
        schema = reader.schema
    except arrow.ArrowInvalid:  # the form with an index at its end
        file = arrow.ipc.open_file(whole)
        batches, schema = (file.get_batch(i) for i in range(file.num_record_batches)), file.schema
    media, names, start = _media_of(schema, path, given), _class_names(schema), 0
    plain = [name for name in schema.names if not _holds_bytes(schema.field(name).type)]
    for batch in batches:
        batch.validate(full=True)  # what is damaged must not be followed
        clips = [None] * len(batch) if media is None else _parts(batch.column(media), whole, path, start=start)
        for row, clip in zip(batch.select(plain).to_pylist(), clips, strict=True):
            yield _plain(row, {} if media is None else {_PATH: clip}, names)
        start += len(batch)


def _parts(column: Any, whole: Any, path: Path, *, start: int) -> list[str | None]:
    """Where the clips of a column lie in the file that is mapped, or their paths if the column holds those."""
    paths: list[str | None] = [None] * len(column)
    cells = column
    if _is_named(column.type):
        paths = column.field("path").to_pylist()
        cells = column.field("bytes")
    place = _place_in_views if str(cells.type).endswith("_view") else _place_by_offsets
    places: list[str | None] = []
    for i, name in enumerate(paths):
        if not cells[i].is_valid:
            places.append(name)
            continue
        address, size = place(cells, cells.offset + i)
        offset = address - whole.address
        if not 0 <= offset <= whole.size - size:
            raise ValueError(f"{path} is packed; save the data set with save_to_disk, or as parquet.")
        places.append(f"{path.name}@{offset}+{size}/{_name(name, start + i)}")
    return places


def _place_by_offsets(cells: Any, number: int) -> tuple[int, int]:
    """The address and size of a value of the types binary and large_binary, which lie behind each other."""
    _, offsets, data = cells.buffers()
    width = 8 if str(cells.type).startswith("large") else 4
    begin, end = (_number(offsets, (number + k) * width, width) for k in (0, 1))
    return data.address + begin, end - begin


def _place_in_views(cells: Any, number: int) -> tuple[int, int]:
    """The address and size of a value of the type binary_view: in its view of 16 bytes, or where that points to."""
    _, views, *data = cells.buffers()
    begin = 16 * number
    if (size := _number(views, begin, 4)) <= 12:
        return views.address + begin + 4, size
    return data[_number(views, begin + 8, 4)].address + _number(views, begin + 12, 4), size


def _number(buffer: Any, begin: int, width: int) -> int:
    return int.from_bytes(buffer[begin : begin + width], "little")


def _lance_table(path: Path, given: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    table = open_lance(str(path))
    schema = guarded(str(path), lambda: table.schema)
    media, names = _media_of(schema, path, given), _class_names(schema)
    holding = {name for name in schema.names if _holds_bytes(schema.field(name).type)}
    if holding.issuperset(schema.names):
        for row in range(guarded(str(path), table.count_rows)):
            yield {_PATH: _cell(path, media, row, None)}
        return
    for row, values in enumerate(lance_rows(path, holding)):
        yield _plain(values, {} if media is None else {_PATH: _cell(path, media, row, None)}, names)


def lance_rows(path: Path, without: Collection[str]) -> Iterator[dict[str, Any]]:
    """The rows of a table of Lance without some columns; VideoError, in one line, if it cannot be read."""
    table = open_lance(str(path))
    columns = guarded(str(path), lambda: [name for name in table.schema.names if name not in without])
    batches = iter(table.scanner(columns=columns, batch_size=_ROWS, scan_in_order=True).to_batches())
    while (rows := guarded(str(path), lambda: _next_rows(batches))) is not None:
        yield from rows


def _next_rows(batches: Iterator[Any]) -> list[dict[str, Any]] | None:
    batch = next(batches, None)
    return None if batch is None else batch.to_pylist()


def _media_of(schema: Any, path: Path, given: Mapping[str, str]) -> str | None:
    """The column with the bytes of the clips, or with their names beside it; None if a plain column holds paths."""
    named = given.get(_PATH)
    if named is not None:
        if named not in schema.names:
            listed = ", ".join(repr(name) for name in schema.names[:_LISTED])
            raise ValueError(f"{path} has no column {named!r} (data.columns.path); it has {listed}.")
        return named if _holds_bytes(schema.field(named).type) else None
    found = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    kinds = _features(schema)
    typed = [name for name in found if kinds.get(name, {}).get("_type") in ("Video", "Image")]
    found = typed or found
    is_media = any(name in typed or _is_named(schema.field(name).type) for name in found)
    if not is_media and _PATH in schema.names and _PATH not in found:
        return None  # the bytes are something else, such as a thumbnail
    if len(found) > 1:
        listed = ", ".join(repr(name) for name in found[:_LISTED])
        raise ValueError(
            f"{path}: the columns {listed} could each hold the clips; say which: data.columns={{path: {found[0]}}}."
        )
    return found[0] if found else None


def _holds_bytes(kind: Any) -> bool:
    name = str(kind)
    return (
        name in ("binary", "large_binary", "binary_view") or name.startswith("extension<lance.blob") or _is_named(kind)
    )


def _is_named(kind: Any) -> bool:
    """Whether a type is that of the library `datasets`: bytes and a name."""
    names = [kind.field(i).name for i in range(kind.num_fields)] if str(kind).startswith("struct<") else []
    return "bytes" in names and "path" in names


def _has_bytes(file: Any, column: str, path: Path) -> bool:
    """Whether a column of bytes and names of a parquet file has bytes, not the names of files alone.

    Rows of the first and the last group are looked at, since of every group that is, all bytes are read; ValueError if they
    differ. A row that differs all the same is refused by its number when it is read.
    """
    # Not by the statistics: pyarrow ends the process where those are damaged.
    groups = file.num_row_groups
    known: tuple[int, bool] | None = None
    for group in sorted({0, groups - 1}) if groups else ():
        start = sum(file.metadata.row_group(i).num_rows for i in range(group))
        for row, batch in enumerate(
            islice(file.iter_batches(1, row_groups=[group], columns=[column]), _LOOKED_AT), start
        ):
            value = (batch.column(0)[0].as_py() if len(batch) else None) or {}
            if value.get("bytes") is None and value.get("path") is None:
                continue  # a row without a clip
            has_bytes = value.get("bytes") is not None
            if known is not None and has_bytes != known[1]:
                kinds = {True: "bytes", False: f"a name alone ({str(value.get('path'))[:80]!r})"}
                raise ValueError(
                    f"{path}: {column!r} has {kinds[has_bytes]} in row {row}, but not in row {known[0]}; write bytes in all rows, "
                    "or names in all."
                )
            known = known or (row, has_bytes)
            break
    return known is not None and known[1]


def _cell(path: Path, column: str | None, row: int, name: str | None) -> str:
    return f"{path.name}@{column}[{row}]/{_name(name, row, picture='image' in str(column).lower())}"


def _name(name: str | None, row: int, *, picture: bool = False) -> str:
    """The name of a clip in messages, whose suffix tells pictures from clips."""
    last = (name or "").replace("\\", "/").rpartition("/")[2][-100:].replace("\0", "")
    return last if "." in last.strip(".") else f"{row}{'.png' if picture else '.mp4'}"


def _plain(row: dict[str, Any], clip: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """A row without what is null, with the names of its classes in place of their numbers."""
    values = {name: value for name, value in row.items() if value is not None}
    for column, known in names.items():
        number = values.get(column)
        if isinstance(number, int):
            if 0 <= number < len(known):
                values[column] = known[number]
            else:
                del values[column]  # -1 is no class
    return values | {key: value for key, value in clip.items() if value is not None}


def _features(schema: Any) -> dict[str, Any]:
    """What the library `datasets` says of the columns; nothing if it did not write the table."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes of each column of classes."""
    kinds = {name: kind.get("names") for name, kind in _features(schema).items() if kind.get("_type") == "ClassLabel"}
    return {name: [str(one) for one in known] for name, known in kinds.items() if isinstance(known, list)}

"""Tables as parquet files, through pyarrow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit.data.packages import pyarrow_of
from stdit.files import atomic_write


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, with the columns that any of them has."""
    pyarrow = pyarrow_of("parquet")
    names = list({name: None for row in rows for name in row})
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    with atomic_write(path) as tmp:
        pyarrow.parquet.write_table(table, tmp)

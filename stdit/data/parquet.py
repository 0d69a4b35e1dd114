"""Tables as parquet files, through pyarrow."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit.files import atomic_write

_ROWS = 4096  # read at a time


def pyarrow_of(extra: str) -> Any:
    """The package pyarrow with its parquet module; ValueError with the extra to install if it is not there."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"parquet files need pyarrow ({error}); run: pip install 'stdit[{extra}]'.") from error
    return pyarrow


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as plain values, without those that are null."""
    pyarrow = pyarrow_of("parquet")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(_ROWS):
            yield from ({name: value for name, value in row.items() if value is not None} for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a parquet file that pyarrow reads ({first}); write it again.") from error


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, with the columns that any of them has."""
    pyarrow = pyarrow_of("parquet")
    names = list({name: None for row in rows for name in row})
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    with atomic_write(path) as tmp:
        pyarrow.parquet.write_table(table, tmp)

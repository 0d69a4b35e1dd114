"""Folders of the library `datasets` of Hugging Face: what `save_to_disk` writes, and folders of parquet files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stdit.data.arrow_tables import given_of_rows, read_table
from stdit.data.folders import is_file, names_in, resolved
from stdit.data.records import Record, as_records
from stdit.data.stores import is_remote
from stdit.files import inside, read_json

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+\.(?i:parquet)")
_TRAIN = "train"


def is_saved(root: Path) -> bool:
    """Whether a folder is one of `save_to_disk`, or holds parquet files, itself or in its folder `data`."""
    return is_file(root / _STATE) or is_file(root / _SPLITS) or bool(_parquet_files(root))


def read_saved(root: Path, given: Mapping[str, str] | None) -> list[Record]:
    """The rows of all files of a folder, in their order, of the split `train` if there are several.

    Paths are relative to the folder. ValueError with a remedy.
    """
    rows: list[dict[str, Any]] = []
    for file in _files(resolved(root)):
        for row in read_table(file, given):
            if str(row.get("path")).startswith(f"{file.name}@"):
                row["path"] = str(file.parent / row["path"])
            rows.append(row)
    return as_records(list(enumerate(rows, 1)), root, given_of_rows(given, rows))


def _files(root: Path) -> list[Path]:
    if is_remote(root) and (is_file(root / _SPLITS) or is_file(root / _STATE)):
        raise ValueError(
            f"{root}: what save_to_disk writes is read from this machine only; copy it here, or upload parquet files."
        )
    if is_file(root / _SPLITS):
        splits = _strings(root / _SPLITS, "splits")
        return _files(inside(root, _chosen(splits, root), "a split"))
    if is_file(root / _STATE):
        return [inside(root, name, "a file of the data set") for name in _strings(root / _STATE, "_data_files")]
    files = _parquet_files(root)
    names = list(dict.fromkeys(found["split"] for file in files if (found := _SHARD.fullmatch(file.name))))
    if len(names) > 1:
        chosen = _chosen(names, root)
        files = [file for file in files if file.name.startswith(f"{chosen}-")]
    return files


def _parquet_files(root: Path) -> list[Path]:
    for folder in (root, root / "data"):
        names = [(name, name.lower()) for name in names_in(folder)]
        found = [folder / name for name, low in names if low.endswith(".parquet") and name != "metadata.parquet"]
        if found:
            return found
    return []


def _chosen(splits: list[str], root: Path) -> str:
    if _TRAIN in splits or len(splits) == 1:
        return _TRAIN if _TRAIN in splits else splits[0]
    raise ValueError(
        f"{root} has the splits {', '.join(sorted(splits))} and no {_TRAIN!r}; give the folder or file of one of them."
    )


def _strings(file: Path, key: str) -> list[str]:
    """A list of names in a JSON file, plain or as {"filename": name}."""
    try:
        found = read_json(file)[key]
        names = [one["filename"] if isinstance(one, dict) else one for one in found]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key} is no list of names")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}); save the data set again."
        ) from error

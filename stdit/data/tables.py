"""The kinds of folders whose clips are rows with numbers, and their reading as one table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stdit.data.archives import is_archived, read_archives
from stdit.data.curated import is_curated, read_curated
from stdit.data.folders import is_folder
from stdit.data.manifest import Table, find_media, table_of
from stdit.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from stdit.data.records import Record
from stdit.data.saved_datasets import is_saved, read_saved


class Kind(NamedTuple):
    """A kind of folder.

    is_one: whether a folder is of this kind. read: its rows, with paths relative to it. loose: whether files of media that lie
    in the folder as well are what is meant, unless the kind is named.
    """

    is_one: Callable[[Path], bool]
    read: Callable[[Path, Mapping[str, str] | None], Sequence[Record]]
    loose: bool


KINDS = {
    "curate": Kind(is_curated, read_curated, loose=False),
    "datasets": Kind(is_saved, read_saved, loose=True),
    "tar": Kind(is_archived, read_archives, loose=True),
}


def kind_of(root: Path) -> str | None:
    """The kind of a folder; None if it is of none of them."""
    for name, kind in KINDS.items():
        if kind.is_one(root) and not (kind.loose and find_media(root, VIDEO_SUFFIXES | IMAGE_SUFFIXES).files):
            return name
    return None


def read_folder(root: Path, name: str, columns: Mapping[str, str] | None, within: Path | None = None) -> Table:
    """The table of a folder of a kind; ValueError with a remedy if it is none.

    within: the folder below which the files lie that its rows name, if not the folder itself.
    """
    if not is_folder(root):
        raise ValueError(f"data.root={str(root)!r} does not exist; give a folder for data.source={name}.")
    if not KINDS[name].is_one(root):
        raise ValueError(
            f"data.root={str(root)!r} is no folder for data.source={name}; see docs/data.md for what it holds."
        )
    return table_of(KINDS[name].read(root, columns), root, within or root, allowed=within or root)

"""The dataset of a run: by an index of its files, which the run makes or brings up to date where that spares time, or without one."""

import glob
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.clips import Images, VideoClips
from stdit.data.config import AUTO, DataConfig
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.folders import resolved
from stdit.data.identity import hash_of
from stdit.data.index import SUFFIX, MediaIndex
from stdit.data.make_index import check_output, make_index, root_of, row_settings
from stdit.data.media import place_of
from stdit.data.stores import is_url
from stdit.files import Claimed, check_writable, claimed
from stdit.warn import warn_once

MANY = 10_000  # files, from which a training makes an index without being asked
_FOLDER = "data"  # of those indexes
_COMPARED = 10_000  # files that are compared with an index that is named, half a second's work
_TRIES = 3  # of opening an index that another run makes again
_PATIENCE = 5.0  # seconds without a word to whoever waits
_LONGEST = 60  # characters of a folder's name in that of its index


class _Wanted(NamedTuple):
    """What an index must have been made of for a run to read it.

    source: the folder or manifest. root: the folder of its files. settings: what the rows depend on besides. by_itself: whether a
    run makes the index without being asked; it knows the headers of files then, and all of them are compared, so that it
    changes nothing but the time that a run takes.
    """

    source: Path
    root: Path
    settings: dict[str, Any]
    by_itself: bool = False

    @classmethod
    def of(cls, data: DataConfig, *, by_itself: bool = False) -> "_Wanted":
        """What the data of a config need."""
        source = _source_of(data)
        return cls(source, root_of(data, source), row_settings(data), by_itself)

    def fits(self, index: MediaIndex) -> bool:
        """Whether the rows of an index of this source are those of the settings and the root."""
        root = str(index.root) == os.path.abspath(self.root) or os.path.realpath(index.root) == os.path.realpath(
            self.root
        )
        return root and index.info.get("settings") == self.settings and index.decoded is not self.by_itself

    def is_current(self, output: Path) -> bool:
        """Whether an index is there and as new as its files; ValueError for one of another folder or manifest."""
        try:
            index = MediaIndex(output)
        except (ValueError, OSError):  # one that is damaged is made again
            return False
        if os.path.realpath(index.source) != os.path.realpath(self.source):
            if self.by_itself:
                return False
            raise ValueError(
                f"data.index={output} is the index of {index.source}, not of {self.source}; give it another name."
            )
        try:
            index.check(None if self.by_itself else _COMPARED)
        except ValueError:
            return False
        return self.fits(index)  # else it is written again from what is known of its files


def build_indexed(data: DataConfig, *, make: bool = True) -> Dataset:
    """The dataset of a config, by the index that `data.index` names, by one of its own (`auto`), or without one.

    make: whether an index is made or brought up to date if need be; else only one that is there and current is read. ValueError
    if the named index is of other data, or another run makes it again and again.
    """
    plain = replace(data, index=None)
    if data.index is None or (data.index == AUTO and data.datasets):
        return build_dataset(plain)
    if data.index == AUTO or not make:
        found = find_index(data)
        if found is not None:
            return read_index(data, found)
        dataset = build_dataset(plain)
        return _by_own_index(plain, dataset) if make and _gains(dataset) else dataset
    if data.datasets:
        raise ValueError("data.index is of one data set; make an index of each, and give it as its manifest.")
    wanted, output = _Wanted.of(plain), Path(data.index)
    check_output(output, wanted.source, "data.index=")
    for _ in range(_TRIES):
        _bring_up_to_date(output, plain, wanted)
        if not wanted.fits(MediaIndex(output)):
            continue
        dataset = read_index(plain, output)
        rows = getattr(dataset, "rows", None)
        if isinstance(rows, MediaIndex) and wanted.fits(rows):
            return dataset
    raise ValueError(
        f"data.index={output} is made again and again by a run of another data.root, data.sizes, data.source or data.columns; "
        "give each an index of its own."
    )


def find_index(data: DataConfig) -> Path | None:
    """The index that a run with this config would read as it is: the named one or its own, if it is there and current.

    No folder and no manifest is read where there is none.
    """
    if data.index is None or data.datasets:
        return None
    by_itself, plain = data.index == AUTO, replace(data, index=None)
    if by_itself and not _own_indexes(_source_of(plain)):
        return None
    wanted = _Wanted.of(plain, by_itself=by_itself)
    output = _own_name(wanted) if by_itself else Path(data.index)
    return output if output is not None and wanted.is_current(output) else None


def read_index(data: DataConfig, index: Path) -> Dataset:
    """The dataset of a config by an index of its files, which have the names that they have without it."""
    dataset = build_dataset(replace(data, index=None, manifest=str(index)))
    rows = getattr(dataset, "rows", None)
    if isinstance(rows, MediaIndex) and not is_url(rows.root):
        root = root_of(data, _source_of(data))
        if os.path.realpath(root) == os.path.realpath(rows.root):
            rows.root = root if data.manifest is None else resolved(root)
    return dataset


def _bring_up_to_date(output: Path, data: DataConfig, wanted: _Wanted) -> None:
    """Make an index unless it is current.

    Of several processes one makes it, and the others wait for its file, not in a collective, which would time out.
    """
    began, said, made = time.monotonic(), False, False
    while not wanted.is_current(output):
        if made and not wanted.fits(MediaIndex(output)):
            break  # another run has made it again for itself
        if made:
            raise ValueError(
                f"{output} is older than its files right after it was made; start again once they no longer change."
            )
        if not said:
            check_writable(output)
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([output]))
            except Claimed:
                if time.monotonic() - began > _PATIENCE and not said:
                    _say(f"waiting for another process that makes {output}")
                    said = True
                time.sleep(1)
                continue
            if not wanted.is_current(output):
                what = "headers of files" if wanted.by_itself else "files"
                _say(f"{output}: {what} that are new or have changed are read, once (data.index=null: no index)")
                known = _own_indexes(wanted.source) if wanted.by_itself else []
                make_index(data, output, source=wanted.source, decode=not wanted.by_itself, also_known=known)
                MediaIndex(output).check()
                made = True


def _by_own_index(data: DataConfig, dataset: Dataset) -> Dataset:
    """A dataset by an index that the run makes without being asked; the dataset itself where none can be made."""
    wanted = _Wanted.of(data, by_itself=True)
    output = _own_name(wanted)
    if output is None or not _is_writable(output):
        return dataset
    _bring_up_to_date(output, data, wanted)
    return read_index(data, output)


def _gains(dataset: Dataset) -> bool:
    """Whether an index spares a run more than a moment: there are many files, each of them one of this machine.

    Processes of several machines may have other disks, and would wait for each other in a collective.
    """
    rows = dataset.rows if isinstance(dataset, VideoClips | Images) else ()
    many = isinstance(rows, list) and len(rows) >= MANY
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return many and here and not is_url(rows[0].path) and place_of(rows[0].path) is None


def _source_of(data: DataConfig) -> Path:
    """The manifest of a config, as it lies from here or from data.root, or else its folder."""
    source = Path(data.manifest or data.root)
    return Path(data.root) / data.manifest if data.manifest and not source.exists() else source


def _stem(source: Path) -> str:
    name = os.path.basename(os.path.abspath(source))
    return (name if source.is_dir() else os.path.splitext(name)[0])[:_LONGEST]


def _folder() -> str:
    """The folder of indexes that runs make, without links, since an index keeps the way from itself to its files."""
    return os.path.relpath(os.path.realpath(_FOLDER))


def _own_indexes(source: Path) -> list[Path]:
    """The indexes that runs on a source have made without being asked, and on others of its name."""
    return [Path(name) for name in glob.glob(f"{glob.escape(os.path.join(_folder(), _stem(source)))}-*{SUFFIX}")]


def _own_name(wanted: _Wanted) -> Path | None:
    """The index of a run, named by all that its rows depend on; None if it would lie among the files that it is of."""
    source, folder = wanted.source, os.path.realpath(_FOLDER)
    if source.suffix == SUFFIX or (source.is_dir() and Path(folder).is_relative_to(os.path.realpath(source))):
        return None
    places = [os.path.relpath(os.path.realpath(place), folder) for place in (source, wanted.root)]
    return Path(_folder()) / f"{_stem(source)}-{hash_of([*places, wanted.settings])[:12]}{SUFFIX}"


def _is_writable(output: Path) -> bool:
    """Whether a file can be written; if not, a warning says what the run does without."""
    try:
        check_writable(output)
    except OSError as error:
        warn_once(str(output), f"{output} cannot be written ({error.strerror}); the run goes on without an index.")
        return False
    return True


def _say(text: str) -> None:
    """Print a line where progress is shown, not among what a command prints."""
    print(text, file=sys.stderr, flush=True)

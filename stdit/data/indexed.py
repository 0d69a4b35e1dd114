"""The dataset of a run: by an index of its files, which the run makes or brings up to date where that spares time, or without one."""

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
from stdit.data.identity import hash_of
from stdit.data.index import SUFFIX, MediaIndex
from stdit.data.make_index import check_output, make_index, row_settings
from stdit.data.media import place_of
from stdit.data.stores import is_url
from stdit.files import check_writable, claimed
from stdit.warn import warn_once

MANY = 10_000  # files, from which a training makes an index without being asked
_FOLDER = Path("data")  # of those indexes
_COMPARED = 10_000  # files that are compared with the index that a run makes, half a second's work
_TRIES = 3  # of opening an index that another run makes again
_PATIENCE = 5.0  # seconds without a word to whoever waits


class _Wanted(NamedTuple):
    """What an index must have been made of for a run to read it: the folder or manifest, the root, and the settings of its rows."""

    source: Path
    root: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, data: DataConfig) -> "_Wanted":
        """What the data of a config need."""
        source = Path(data.manifest or data.root)
        if data.manifest and not source.exists():
            source = Path(data.root) / data.manifest
        return cls(source, data.root, row_settings(data))

    def finds(self, output: Path) -> bool:
        """Whether an index lies there and was made of this, which may have changed since."""
        try:
            index = MediaIndex(output)
        except ValueError:
            return False
        return self._is_source_of(index) and self.fits(index)

    def fits(self, index: MediaIndex) -> bool:
        """Whether the rows of an index of this source are those of the settings and the root."""
        root = str(index.root) == os.path.abspath(self.root) or os.path.realpath(index.root) == os.path.realpath(
            self.root
        )
        return root and index.info.get("settings") == self.settings

    def _is_source_of(self, index: MediaIndex) -> bool:
        return os.path.realpath(index.source) == os.path.realpath(self.source)

    def is_current(self, output: Path) -> bool:
        """Whether an index is there and as new as its files; ValueError for one of another folder or manifest."""
        try:
            index = MediaIndex(output)
        except ValueError:
            return False
        if not self._is_source_of(index):
            raise ValueError(
                f"data.index={output} is the index of {index.source}, not of {self.source}; give it another name."
            )
        try:
            index.check(_COMPARED)
        except ValueError:
            return False
        return self.fits(index)  # else it is written again from what is known of its files


def build_indexed(data: DataConfig, *, make: bool = True) -> Dataset:
    """The dataset of a config, by the index that `data.index` names, by one in data/ (`auto`), or without one.

    make: whether an index is made or brought up to date if need be; else only one that is there and current is read. ValueError
    if the named index is of other data, or another run makes it again and again.
    """
    plain = replace(data, index=None)
    if data.index is None or (data.index == AUTO and data.datasets):
        return build_dataset(plain)
    if not make:
        found = find_index(data)
        return build_dataset(plain) if found is None else read_index(data, found)
    if data.datasets:
        raise ValueError("data.index is of one data set; make an index of each, and give it as its manifest.")
    wanted = _Wanted.of(plain)
    output = _own_index(plain, wanted) if data.index == AUTO else Path(data.index)
    if not isinstance(output, Path):
        return output
    check_output(output, wanted.source, "data.index=")
    for _ in range(_TRIES):
        _bring_up_to_date(output, plain, wanted)
        if not wanted.fits(MediaIndex(output)):
            continue
        dataset = read_index(data, output)
        rows = getattr(dataset, "rows", None)
        if isinstance(rows, MediaIndex) and wanted.fits(rows):
            return dataset
    raise ValueError(
        f"data.index={output} is made again and again by a run of another data.root, data.sizes, data.source or data.columns; "
        "give each an index of its own."
    )


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
        check_writable(output)
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([output]))
            except ValueError:
                if time.monotonic() - began > _PATIENCE and not said:
                    _say(f"waiting for another process that makes {output}")
                    said = True
                time.sleep(1)
                continue
            if not wanted.is_current(output):
                _say(f"{output}: files that are new or have changed are read in full, once (data.index=null: no index)")
                make_index(data, output, source=wanted.source)
                MediaIndex(output).check()
                made = True


def find_index(data: DataConfig) -> Path | None:
    """The index that a run with this config would take as it is: the one that is named or found is there and current; else None.

    No folder and no manifest is read for it.
    """
    if data.index is None or data.datasets:
        return None
    wanted = _Wanted.of(replace(data, index=None))
    outputs = _names(wanted) if data.index == AUTO else [Path(data.index)]
    return next((output for output in outputs if wanted.finds(output) and wanted.is_current(output)), None)


def read_index(data: DataConfig, index: Path) -> Dataset:
    """The dataset of a config by an index of its files."""
    return build_dataset(replace(data, index=None, manifest=str(index)))


def _own_index(data: DataConfig, wanted: _Wanted) -> Path | Dataset:
    """The index that a run takes without being asked, or the dataset where there is none to take.

    It is `data/NAME.index` of the folder or manifest NAME, if it was made of it under these settings, or else one with a hash of
    them in its name, which is made for `MANY` files or more.
    """
    names = _names(wanted)
    for output in names:
        if wanted.finds(output) and (wanted.is_current(output) or _is_writable(output)):
            return output
    dataset = build_dataset(data)
    return names[-1] if names and _gains(dataset) and _is_writable(names[-1]) else dataset


def _names(wanted: _Wanted) -> list[Path]:
    """The indexes that a run looks for: that of the source's own name, and one of everything on which its rows depend."""
    source = wanted.source
    of_files = wanted.settings["source"] in ("auto", "videos", "images") and source.suffix != SUFFIX
    if not of_files or is_url(source) or not source.exists():
        return []
    place = os.path.realpath(source)
    if source.is_dir() and _FOLDER.resolve().is_relative_to(place):
        return []  # it would lie among the files that it is of
    name, own = Path(place).stem, hash_of([place, os.path.realpath(wanted.root), wanted.settings])[:12]
    return [_FOLDER / f"{name}{SUFFIX}", _FOLDER / f"{name}-{own}{SUFFIX}"]


def _gains(dataset: Dataset) -> bool:
    """Whether an index spares a run more than a moment: there are many files, each of them one of this machine."""
    rows = dataset.rows if isinstance(dataset, VideoClips | Images) else ()
    many = isinstance(rows, list) and len(rows) >= MANY
    return many and not is_url(rows[0].path) and place_of(rows[0].path) is None


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

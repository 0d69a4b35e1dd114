"""The dataset of a run: by the index that `data.index` names, which the run makes or brings up to date, or without one."""

import multiprocessing
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset, build_dataset
from stdit.data.index import MediaIndex
from stdit.data.make_index import check_output, make_index, row_settings
from stdit.files import Claimed, check_writable, claimed

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

    def fits(self, index: MediaIndex) -> bool:
        """Whether the rows of an index of this source are those of the settings and the root."""
        root = str(index.root) == os.path.abspath(self.root) or os.path.realpath(index.root) == os.path.realpath(
            self.root
        )
        return root and index.info.get("settings") == self.settings

    def is_current(self, output: Path) -> bool:
        """Whether an index is there and as new as its files; ValueError for one of another folder or manifest."""
        try:
            index = MediaIndex(output)
        except ValueError:
            return False
        if os.path.realpath(index.source) != os.path.realpath(self.source):
            raise ValueError(
                f"data.index={output} is the index of {index.source}, not of {self.source}; give it another name."
            )
        try:
            index.check(_COMPARED)
        except ValueError:
            return False
        return self.fits(index)  # else it is written again from what is known of its files


def build_indexed(data: DataConfig) -> Dataset:
    """The dataset of a config, by the index that `data.index` names, if any, which is made or brought up to date if need be.

    ValueError if that is the index of other data, or another run makes it again and again.
    """
    plain = replace(data, index=None)
    if data.index is None:
        return build_dataset(plain)
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
    """The index that `data.index` names, if it is there and current; no manifest is read for it."""
    if data.index is None or data.datasets:
        return None
    output = Path(data.index)
    return output if _Wanted.of(replace(data, index=None)).is_current(output) else None


def read_index(data: DataConfig, index: Path) -> Dataset:
    """The dataset of a config by an index of its files."""
    return build_dataset(replace(data, index=None, manifest=str(index)))


def _bring_up_to_date(output: Path, data: DataConfig, wanted: _Wanted) -> None:
    """Make an index unless it is current.

    Of several processes one makes it, and the others wait for its file, not in a collective, which would time out.
    """
    began, waited, said, made = time.monotonic(), False, False, False
    while not wanted.is_current(output):
        if made and not wanted.fits(MediaIndex(output)):
            break  # another run has made it again for itself
        if made:
            raise ValueError(
                f"{output} is older than its files right after it was made; start again once they no longer change."
            )
        if not waited:
            check_writable(output)
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([output]))
            except Claimed:
                _check_not_importing_main(output)
                if time.monotonic() - began > _PATIENCE and not said:
                    _say(f"waiting for another process that makes {output}")
                    said = True
                waited = True
                time.sleep(1)
                continue
            if not wanted.is_current(output):
                _say(f"{output}: files that are new or have changed are read in full, once")
                make_index(data, output, source=wanted.source, workers=0 if data.workers == 0 else None)
                MediaIndex(output).check()
                made = True


def _check_not_importing_main(output: Path) -> None:
    """Raise RuntimeError in a process that runs the script of its parent again, which waits for it while it makes the index."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as Python asks before it starts a process
        raise RuntimeError(
            f"{output} is made by the process that started this one; put what a script does below `if __name__ == '__main__':`."
        )


def _say(text: str) -> None:
    """Print a line where progress is shown, not among what a command prints."""
    print(text, file=sys.stderr, flush=True)

"""Read every file of a folder or manifest in full, once, and keep what was found in one file that any number of runs opens.

    stdit index data/clips --output data/clips.index
    stdit index clips.csv --output data/clips.index --parquet clips.parquet
    stdit train video data.manifest=data/clips.index

The same command again reads only files that are new or have changed; one that was stopped goes on. A run on an index opens a
million rows at once, in every process, and refuses an index that is older than its files.
"""

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import av

from stdit.data.actions import known_actions
from stdit.data.clips import Images, VideoClips
from stdit.data.columns import looks_like_table
from stdit.data.config import DataConfig
from stdit.data.datasets import Dataset, build_dataset, source_of
from stdit.data.folders import named_from
from stdit.data.identity import fingerprint
from stdit.data.index import SUFFIX, MediaIndex, entries_of, note_states, source_state, write_index
from stdit.data.inspections import inspect_all
from stdit.data.manifest import Table
from stdit.data.media_report import overview
from stdit.data.packages import pyarrow_of
from stdit.data.parquet import write_parquet
from stdit.data.stores import is_url, url_of
from stdit.files import check_writable, claimed
from stdit.recipes.check_media import data_config_of, judged
from stdit.recipes.entry import check_least, command, command_parser
from stdit.warn import warn_user

_COMPARED = 10_000  # files that are compared with the index that a run makes, half a second's work
_TRIES = 3  # of opening an index that another run makes again
_PATIENCE = 5.0  # seconds without a word to whoever waits
TIMEOUT, MEMORY = 300.0, 4.0  # seconds and GB for one file in a process that reads


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the index; exit code 1 if none of the files can be read."""
    parser = command_parser("index", __doc__)
    parser.add_argument(
        "source", type=Path, help="a folder, or a manifest (.jsonl, .csv, .parquet, .lance), or the URL of one"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as data.root=FOLDER of the manifest's files, or data.columns={path: video}",
    )
    parser.add_argument("--output", required=True, type=Path, help=f"the index, NAME{SUFFIX}")
    parser.add_argument(
        "--hash",
        action="store_true",
        help="keep a hash of each file (its size, beginning, middle and end), by which copied and touched files are known",
    )
    parser.add_argument("--parquet", type=Path, help="write the table as parquet too (needs pyarrow)")
    parser.add_argument("--workers", type=int, help="processes that read; 0: this one (default: by cores and files)")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one file in such a process")
    parser.add_argument("--memory", type=float, default=MEMORY, help="GB that it may take for one file; 0: no limit")
    args = parser.parse_intermixed_args(argv)
    check_least(args, "workers", least=0)
    _check_output(args.output, args.source)
    if args.parquet is not None:
        pyarrow_of("parquet")
        _check_beside(args.parquet, args.source)
        check_writable(args.parquet)
    check_writable(args.output)
    with claimed([args.output]):
        return _index(args)


def _index(args: Namespace) -> int:
    data = data_config_of(args.source, None, args.overrides, alone=True)
    limits = {"workers": args.workers, "timeout": args.timeout, "memory": args.memory}
    dataset, entries = make_index(data, args.output, source=args.source, hashed=args.hash, **limits)
    checked = {path: judged(path, entry, data) for path, entry in entries.items()}
    print(overview(checked, dataset, data, ruled=False))
    if args.parquet:
        write_parquet(args.parquet, _plain_rows(MediaIndex(args.output), args.parquet.absolute().parent))
    print(f"{args.output}: {len(dataset)} rows; train on them with data.manifest={args.output}")
    return 0 if any(one.facts for one in checked.values()) else 1


def make_index(
    data: DataConfig,
    output: Path,
    *,
    source: Path,
    hashed: bool = False,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    memory: float = MEMORY,
) -> tuple[VideoClips | Images, dict[Path, dict[str, Any]]]:
    """Write the index of a dataset, reading the files that an index there does not know -> dataset, the entry of every file.

    source: the folder or manifest of the dataset. The others are those of `stdit index`.
    """
    before = source_state(source)  # reading takes hours, in which the source may change
    dataset = build_dataset(data)
    if not isinstance(dataset, VideoClips | Images):
        raise ValueError(f"{str(source)!r} holds no files of videos or pictures; an index is of nothing else.")
    av.logging.set_level(None)
    notes = note_states(dataset.rows)
    paths = list(dict.fromkeys(row.path for row in dataset.rows))
    journal = output.with_suffix(".partial.jsonl")
    earlier = {os.path.realpath(file): entry for file, entry in _entries(output).items()}
    absolute = {str(path): os.path.realpath(path) for path in paths}
    known = {name: {**earlier[found], "path": name} for name, found in absolute.items() if found in earlier}
    limits: dict[str, Any] = {"workers": workers, "timeout": timeout, "memory": memory}
    entries = inspect_all(paths, journal, backend=data.backend, known=known, **limits)
    write_index(
        output, Table(dataset.rows, dataset.num_classes, dataset.class_names),
        {str(path): entry for path, entry in zip(paths, entries, strict=True)}, source=source, root=Path(data.root),
        fingerprint=fingerprint(dataset), action_space=known_actions(dataset), settings=_settings(data),
        hashed=hashed or any("content" in entry for entry in known.values()), before=before, notes=notes,
    )  # fmt: skip
    journal.unlink(missing_ok=True)
    return dataset, dict(zip(paths, entries, strict=True))


def build_indexed(data: DataConfig) -> Dataset:
    """The dataset of a config, by the index that `data.index` names, if any (see `indexed`)."""
    for _ in range(_TRIES):
        given = indexed(data)
        if data.index is not None and not _is_of(MediaIndex(Path(data.index)), replace(data, index=None)):
            continue
        dataset = build_dataset(given)
        rows = getattr(dataset, "rows", None)
        if data.index is None or (isinstance(rows, MediaIndex) and _is_of(rows, replace(data, index=None))):
            return dataset
    raise ValueError(
        f"data.index={data.index} is made again and again by a run of another data.root, data.sizes, data.source or data.columns; "
        "give each an index of its own."
    )


def indexed(data: DataConfig) -> DataConfig:
    """The config of data whose manifest is the index that `data.index` names; it is made, or brought up to date, if need be.

    Of several processes one makes it, and the others wait for its file, not in a collective, which would time out.
    """
    if data.index is None:
        return data
    if data.datasets:
        raise ValueError("data.index is of one data set; make an index of each, and give it as its manifest.")
    output, plain = Path(data.index), replace(data, index=None)
    source = Path(data.manifest or data.root)
    if data.manifest and not source.exists():
        source = Path(data.root) / data.manifest
    _check_output(output, source, "data.index=")
    check_writable(output)
    began, said, made = time.monotonic(), False, False
    while not _is_current(output, source, plain):
        if made and not _is_of(MediaIndex(output), plain):
            break  # another run has made it again for itself
        if made:
            raise ValueError(
                f"{output} is older than its files right after it was made; start again once they no longer change."
            )
        with ExitStack() as claim:
            try:
                claim.enter_context(claimed([output]))
            except ValueError:
                if time.monotonic() - began > _PATIENCE and not said:
                    print(f"waiting for another process that makes {output}", flush=True)
                    said = True
                time.sleep(1)
                continue
            if not _is_current(output, source, plain):
                make_index(plain, output, source=source)
                MediaIndex(output).check()
                made = True
    return replace(plain, manifest=str(output))


def _settings(data: DataConfig) -> dict[str, Any]:
    """What the rows of an index depend on besides its source and its root."""
    if data.manifest is not None:  # which has its rows whatever they are read as
        return {"columns": dict(data.columns), "source": data.source, "pictures": False}
    source = source_of(data)
    pictures = source == "videos" and any(size[0] == 1 for size in data.sizes)  # which are clips of one frame
    return {"columns": dict(data.columns), "source": source, "pictures": pictures}


def _is_current(output: Path, source: Path, data: DataConfig) -> bool:
    """Whether an index is there and as new as its files; ValueError for one of another folder or manifest."""
    try:
        index = MediaIndex(output)
    except ValueError:
        return False
    if os.path.realpath(index.source) != os.path.realpath(source):
        raise ValueError(f"data.index={output} is the index of {index.source}, not of {source}; give it another name.")
    try:
        index.check(_COMPARED)
    except ValueError:
        return False
    return _is_of(index, data)  # else it is written again from what is known of its files


def _is_of(index: MediaIndex, data: DataConfig) -> bool:
    """Whether an index was made under the settings of a config on which its rows depend."""
    root = str(index.root) == os.path.abspath(data.root) or os.path.realpath(index.root) == os.path.realpath(data.root)
    return root and index.info.get("settings") == _settings(data)


def _check_output(output: Path, source: Path, option: str = "--output ") -> None:
    """Raise ValueError for another suffix, for what is no index, and for one inside the folder of its files, whose time it would change."""
    if output.suffix != SUFFIX:
        raise ValueError(f"{option}{output} is no name of an index; call it {output.with_suffix(SUFFIX)}.")
    if output.exists() and not looks_like_table(output):
        raise ValueError(f"{option}{output} is there and is no index; choose another name.")
    if source.suffix == SUFFIX:
        raise ValueError(
            f"{url_of(source) if is_url(source) else source} is an index already; give the folder or manifest that it was made from."
        )
    _check_beside(output, source)


def _check_beside(output: Path, source: Path) -> None:
    """Raise ValueError for a file inside the folder of the clips, which would be newer than its index at once."""
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{output} lies in {source} itself; put it next to it, for example {source.resolve().name}{output.suffix}."
        )


def _entries(output: Path) -> dict[str, dict[str, Any]]:
    """The entries of the index that is there; none, with a warning, of one that cannot be read, which is made anew."""
    try:
        if not output.is_file():
            return {}
        index = MediaIndex(output)
        index.check_columns()
        return entries_of(index)
    except ValueError as error:
        warn_user(f"{error} All files are read again.")
        return {}


def _plain_rows(index: MediaIndex, folder: Path) -> list[dict[str, Any]]:
    """The rows with what was measured, under the names that a manifest in `folder` has."""
    rows = []
    for i, (path, label, caption, columns) in enumerate(index):
        facts, names = index.facts(i), index.info["class_names"]
        row = {
            "path": named_from(path, folder),
            "label": names[label] if names and label is not None else label,
        }
        measured: dict[str, Any] = facts._asdict() if facts else {"refused": index.refused(i)}
        if "last" in measured:
            measured["time_of_last_frame"] = measured.pop("last")
        rows.append({**row, "caption": caption or None, **measured, **columns})
    return rows

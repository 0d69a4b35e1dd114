"""Read every file of a folder or manifest in full, and say which of them training cannot use, and why.

    stdit check-media path/to/clips
    stdit check-media clips.csv --report report.jsonl
    stdit check-media path/to/clips --config video data.num_frames=17 --sheet sheet.png --manifest clean.jsonl

With --config the rules of that config's training are applied too: length, rate and size. With --report a check that was
stopped goes on with the files that are missing or have changed. Exit code 1 if a file cannot be used.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import av
from tqdm import tqdm

from stdit.config import Config, load_typed
from stdit.data.config import DataConfig
from stdit.data.datasets import Images, VideoClips, build_dataset
from stdit.data.facts import Facts, assess
from stdit.data.inspect import inspect
from stdit.data.media_report import Checked, overview, write_clean_manifest, write_sheet
from stdit.data.workers import WorkerPool, num_workers
from stdit.files import check_writable, write_text
from stdit.recipes.entry import command, command_parser

_FACTS = Facts._fields


class _Files:
    """The files to read, as the loader's processes load them: by number, each to an entry of the report."""

    def __init__(self, paths: list[Path], backend: str):
        self.paths, self.config = paths, DataConfig(num_frames=1, height=1, width=1, backend=backend)  # type: ignore[arg-type]

    def load(self, key: int, set_aside: Mapping[str, str], reading: Callable[[str], None]) -> dict[str, Any]:
        """Read a file in full -> its entry; a file that crashed or stalled a process is refused."""
        path, began = self.paths[key], time.perf_counter()
        entry: dict[str, Any] = {"path": str(path), **_state(path)}
        aside = set_aside.get(str(path))
        if aside is not None:
            return {**entry, "refused": aside.removeprefix(repr(str(path))).strip()}
        reading(str(path))
        found = inspect(path, self.config, decode=True)
        if found.facts is None:
            entry["refused"] = found.refused
        else:
            entry |= found.facts._asdict()
        return {**entry, "seconds": round(time.perf_counter() - began, 2)}


def _state(path: Path) -> dict[str, int]:
    try:
        found = path.stat()
    except OSError:
        return {}
    return {"bytes": found.st_size, "modified": found.st_mtime_ns}


def read_report(path: Path | None) -> dict[str, dict[str, Any]]:
    """The entries of an earlier report by path; ValueError if the file is something else."""
    if path is None or not path.is_file():
        return {}
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            if "refused" in entry or all(name in entry for name in _FACTS):
                entries[entry["path"]] = entry
        except (ValueError, KeyError, TypeError, RecursionError):  # also a line that was not written to its end
            continue
    if not entries and path.stat().st_size:
        raise ValueError(f"{path} exists and is no report; choose another --report, or remove it.")
    return entries


def check(paths: list[Path], backend: str, workers: int, timeout: float) -> Iterator[dict[str, Any]]:
    """Read files in full, in `workers` processes that are replaced when one dies -> an entry for each, in order."""
    files = _Files(paths, backend)
    if not workers:
        yield from (files.load(i, {}, lambda name: None) for i in range(len(paths)))
        return
    pool = WorkerPool(files, workers, timeout, {})
    with closing(pool.batches(iter([[i] for i in range(len(paths))]))) as groups:
        for (entry,) in groups:
            yield entry


def check_all(
    paths: list[Path], report: Path | None, *, backend: str, workers: int | None, timeout: float
) -> list[dict[str, Any]]:
    """The entry of every file: from the report if the file is as it was, else by reading it, added to the report at once."""
    known = read_report(report)
    missing = [path for path in paths if not _is_current(known.get(str(path)), path)]
    if len(missing) < len(paths):
        print(f"{len(paths) - len(missing)} files are in {report} already, and have not changed")
    if workers is None:  # a process takes seconds to start
        workers = min(num_workers(None, True), len(missing) // 32)
    stream = open(report, "a", encoding="utf-8") if report else None  # noqa: SIM115 (closed below)
    if stream is not None and stream.tell():
        stream.write("\n")  # the last line may have been cut
    try:
        for entry in tqdm(check(missing, backend, workers, timeout), total=len(missing), unit="file", disable=None):
            known[entry["path"]] = entry
            if stream is not None:
                stream.write(json.dumps(entry) + "\n")
                stream.flush()
    finally:
        if stream is not None:
            stream.close()
    return [known[str(path)] for path in paths]


def _is_current(entry: dict[str, Any] | None, path: Path) -> bool:
    return entry is not None and {key: entry[key] for key in ("bytes", "modified") if key in entry} == _state(path)


def _data_config(source: Path, config: str | None, overrides: list[str]) -> DataConfig:
    """The data config of a training, with `source` as its data; without a config one that any file is long enough for."""
    if config is None and overrides:
        raise ValueError(f"{overrides[0]!r} overrides a config; say which with --config, for example --config video.")
    manifest = next((one for one in overrides if one.startswith("data.manifest=")), None)
    if manifest is not None:
        raise ValueError(f"{manifest} has no effect here; give the manifest itself in place of {str(source)!r}.")
    data = load_typed(Config, config, overrides).data if config else DataConfig(num_frames=1, height=1, width=1)
    if source.is_file():
        chosen = any(override.startswith("data.root=") for override in overrides)
        data.root, data.manifest = data.root if chosen else str(source.parent), str(source)
    else:
        data.root, data.manifest = str(source), None
    if data.source not in ("videos", "images"):
        data.source = "auto"
    return data


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read every file; exit code 1 if training cannot use one of them."""
    parser = command_parser("check-media", __doc__)
    parser.add_argument("source", type=Path, help="a folder, or a manifest (.jsonl, .csv)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of --config")
    parser.add_argument("--config", help="apply the rules of this config's training: a path, or a name in the package")
    parser.add_argument("--report", type=Path, help="write one JSON line per file here; a second call goes on from it")
    parser.add_argument("--manifest", type=Path, help="write a manifest of the usable rows here (.jsonl or .csv)")
    parser.add_argument("--sheet", type=Path, help="write a picture with a frame of up to 60 files here (.png)")
    parser.add_argument("--workers", type=int, help="processes that read; 0: this one (default: by cores and files)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one file in such a process")
    args = parser.parse_intermixed_args(argv)
    for path in (args.manifest, args.sheet):
        if path is not None and path.exists():
            raise ValueError(f"{path} exists; choose another name, or remove it.")
    for path in (args.manifest, args.sheet, args.report):
        if path is not None:
            check_writable(path)
    av.logging.set_level(None)
    data = _data_config(args.source, args.config, args.overrides)
    dataset = build_dataset(data)
    if not isinstance(dataset, VideoClips | Images):
        raise ValueError(f"{str(args.source)!r} holds no files of videos or pictures; check-media reads nothing else.")
    paths = list(dict.fromkeys(row.path for row in dataset.rows))
    entries = check_all(paths, args.report, backend=data.backend, workers=args.workers, timeout=args.timeout)
    checked = {path: _judged(path, entry, data) for path, entry in zip(paths, entries, strict=True)}
    if args.report:
        write_text(args.report, "".join(json.dumps(one.entry) + "\n" for one in checked.values()))
    print(overview(checked, dataset, data, ruled=args.config is not None))
    if args.sheet:
        print(f"{args.sheet}: a frame of {write_sheet(args.sheet, checked)} files")
    if args.manifest:
        count = write_clean_manifest(args.manifest, checked, dataset)
        print(
            f"{args.manifest}: {count} usable rows; train on them with data.root={data.root} data.manifest={args.manifest}"
        )
    return 1 if any(one.reason for one in checked.values()) else 0


def _judged(path: Path, entry: dict[str, Any], config: DataConfig) -> Checked:
    """An entry with what the config says of the file: why training leaves it out, and what it does to it."""
    entry = {key: value for key, value in entry.items() if key not in ("left_out", "notes")}
    if "refused" in entry:
        return Checked(path, entry, None, entry["refused"])
    facts = Facts(**{name: entry[name] for name in _FACTS})
    found = assess(facts, config)
    if found.refused:
        entry["left_out"] = found.refused
    if found.notes:
        entry["notes"] = list(found.notes)
    return Checked(path, entry, facts, found.refused)

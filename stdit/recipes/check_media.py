"""Read every file of a folder or manifest in full, and say which of them training cannot use, and why.

    stdit check-media path/to/clips
    stdit check-media clips.csv --report report.jsonl
    stdit check-media path/to/clips --config video data.num_frames=17 --sheet sheet.png --manifest clean.jsonl

With --config the rules of that config's training are applied too: length, rate and size. With --report a check that was
stopped goes on with the files that are missing or have changed. Exit code 1 if a file cannot be used.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av

from stdit.config import Config, load_typed
from stdit.data.config import DataConfig
from stdit.data.datasets import Images, VideoClips, build_dataset
from stdit.data.facts import Facts, assess
from stdit.data.folders import is_file
from stdit.data.index import entries_of
from stdit.data.inspections import MEASURED, inspect_all
from stdit.data.media_report import Checked, overview, write_clean_manifest, write_sheet
from stdit.data.records import is_table
from stdit.data.stores import allow, is_url
from stdit.data.tables import kind_of
from stdit.files import check_writable, write_text
from stdit.recipes.entry import command, command_parser


def data_config_of(source: Path, config: str | None, overrides: list[str], *, alone: bool = False) -> DataConfig:
    """The data config of a training, with `source` as its data; without a config one that any file is long enough for.

    alone: whether overrides may be given without a config.
    """
    if config is None and overrides and not alone:
        raise ValueError(f"{overrides[0]!r} overrides a config; say which with --config, for example --config video.")
    manifest = next((one for one in overrides if one.startswith("data.manifest=")), None)
    if manifest is not None:
        raise ValueError(f"{manifest} has no effect here; give the manifest itself in place of {str(source)!r}.")
    if not is_url(source) and not source.exists():
        raise ValueError(f"{str(source)!r} does not exist; give a folder, a manifest, or the URL of one.")
    any_file = [] if config else ["data.num_frames=1", "data.height=1", "data.width=1"]
    data = load_typed(Config, config, [*any_file, *overrides]).data
    allow(source)
    chosen = any(override.startswith("data.root=") for override in overrides)
    if is_file(source) or is_table(source) or (chosen and kind_of(source) == "datasets"):
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
    parser.add_argument(
        "source", type=Path, help="a folder, or a manifest (.jsonl, .csv, .parquet, .lance), or the URL of one"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of --config")
    parser.add_argument("--config", help="apply the rules of this config's training: a path, or a name in the package")
    parser.add_argument("--report", type=Path, help="write one JSON line per file here; a second call goes on from it")
    parser.add_argument("--manifest", type=Path, help="write a manifest of the usable rows here (.jsonl or .csv)")
    parser.add_argument("--sheet", type=Path, help="write a picture with a frame of up to 60 files here (.png)")
    parser.add_argument("--workers", type=int, help="processes that read; 0: this one (default: by cores and files)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one file in such a process")
    parser.add_argument("--memory", type=float, default=4.0, help="GB that it may take for one file; 0: no limit")
    args = parser.parse_intermixed_args(argv)
    for path in (args.manifest, args.sheet):
        if path is not None and path.exists():
            raise ValueError(f"{path} exists; choose another name, or remove it.")
    for path in (args.manifest, args.sheet, args.report):
        if path is not None:
            check_writable(path)
    av.logging.set_level(None)
    data = data_config_of(args.source, args.config, args.overrides)
    dataset = build_dataset(data)
    if not isinstance(dataset, VideoClips | Images):
        raise ValueError(f"{str(args.source)!r} holds no files of videos or pictures; check-media reads nothing else.")
    paths = list(dict.fromkeys(row.path for row in dataset.rows))
    known = entries_of(dataset.index) if dataset.index is not None else None
    entries = inspect_all(
        paths,
        args.report,
        backend=data.backend,
        workers=args.workers,
        timeout=args.timeout,
        memory=args.memory,
        known=known,
    )
    checked = {path: judged(path, entry, data) for path, entry in zip(paths, entries, strict=True)}
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


def judged(path: Path, entry: dict[str, Any], config: DataConfig) -> Checked:
    """An entry with what the config says of the file: why training leaves it out, and what it does to it."""
    entry = {key: value for key, value in entry.items() if key not in ("left_out", "notes")}
    if "refused" in entry:
        return Checked(path, entry, None, entry["refused"])
    facts = Facts(**{name: entry[name] for name in MEASURED if name in entry})
    found = assess(facts, config)
    if found.refused:
        entry["left_out"] = found.refused
    if found.notes:
        entry["notes"] = list(found.notes)
    return Checked(path, entry, facts, found.refused)

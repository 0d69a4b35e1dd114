"""Read every file of a folder or manifest in full, once, and keep what was found in one file that any number of runs opens.

    stdit index data/clips --output data/clips.index
    stdit index clips.csv --output data/clips.index --parquet clips.parquet
    stdit train video data.manifest=data/clips.index

The same command again reads only files that are new or have changed; one that was stopped goes on. A run on an index opens a
million rows at once, in every process, and refuses an index that is older than its files.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stdit.data.folders import named_from
from stdit.data.index import SUFFIX, MediaIndex
from stdit.data.make_index import MEMORY, TIMEOUT, check_not_inside, check_output, make_index
from stdit.data.media_report import overview
from stdit.data.packages import pyarrow_of
from stdit.data.parquet import write_parquet
from stdit.files import check_writable, claimed
from stdit.recipes.check_media import data_config_of, judged
from stdit.recipes.entry import check_least, command, command_parser


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
    check_output(args.output, args.source)
    if args.parquet is not None:
        pyarrow_of("parquet")
        check_not_inside(args.parquet, args.source)
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

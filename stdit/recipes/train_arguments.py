"""The arguments of `stdit train`, read and checked without torch, whose import takes seconds."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from stdit.data.stores import is_url, url_of
from stdit.recipes.entry import command_parser


def read_arguments(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """Parse a command line of `stdit train`; ValueError for arguments that do not go together, or data that is not there."""
    parser = command_parser("train", description)
    add = parser.add_argument
    add("config", nargs="?", help="a path, or the name of a config in the package; not needed with --data")
    add("overrides", nargs="*", metavar="key=value")
    add("--data", type=Path, metavar="PATH", help="a folder, manifest or index of clips or pictures")
    add("--minutes", type=float, help="of the training that --data proposes; default: 30 on a CPU, 120 on a GPU")
    add("--print-config", action="store_true", help="print the resolved config and stop")
    args = parser.parse_intermixed_args(argv)
    if args.config is not None and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.minutes is not None and (args.data is None or args.config is not None):
        raise ValueError(
            "--minutes belongs to --data without a config, for which a training is proposed; leave it out."
        )
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise ValueError(f"--minutes {args.minutes:g}: give a number above 0 and below a million.")
    if args.data is None:
        if args.config is None:
            raise ValueError(
                "name a config, for example stdit train quickstart, or data: stdit train --data path/to/clips."
            )
        return
    fixed = next(
        (one for one in args.overrides if one.startswith(("data.root=", "data.manifest=", "data.datasets="))), None
    )
    if fixed is not None:
        raise ValueError(f"--data {args.data} and {fixed} both name the data; give one of them.")
    if is_url(args.data):
        raise ValueError(f"--data is for files on this machine; name a config and data.root={url_of(args.data)}.")
    if not args.data.exists():
        raise ValueError(f"--data {args.data} does not exist; give a folder, a manifest or an index.")
    if args.data.is_dir() and not any(files for _, _, files in os.walk(args.data, followlinks=True)):
        raise ValueError(f"--data {args.data} holds no files; give a folder of videos or pictures.")

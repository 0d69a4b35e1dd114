"""Read every video of a folder or manifest in full, and list those that cannot be used, with the reason.

stdit check-media path/to/clips
stdit check-media clips.csv --report report.jsonl
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import av
from tqdm import tqdm

from stdit.data.manifest import VIDEO_SUFFIXES, read_manifest, scan_folder
from stdit.data.video_io import VideoError, VideoReader
from stdit.files import write_text
from stdit.recipes.entry import command, command_parser


def check(path: Path, chunk: int = 8) -> dict:
    """Decode every frame of a file; returns its frame count, rate and size, or the reason why it cannot be used."""
    began = time.perf_counter()
    try:
        with VideoReader(path) as reader:
            count = sum(
                len(reader.get_frames(range(i, min(i + chunk, len(reader))))) for i in range(0, len(reader), chunk)
            )
            found: dict = {
                "frames": count,
                "fps": round(reader.fps, 3),
                "height": reader.size[0],
                "width": reader.size[1],
            }
    except VideoError as error:
        found = {"refused": str(error)}
    return {"path": str(path), **found, "seconds": round(time.perf_counter() - began, 2)}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read every file; the exit code is 1 if any cannot be read."""
    parser = command_parser("check-media", __doc__)
    parser.add_argument("source", help="a folder, or a manifest (.jsonl, .csv)")
    parser.add_argument("--report", help="write a JSON line per file to this file")
    args = parser.parse_args(argv)
    av.logging.set_level(None)
    source = Path(args.source)
    rows = read_manifest(source).rows if source.is_file() else scan_folder(source, VIDEO_SUFFIXES, "videos").rows
    results = [check(row.path) for row in tqdm(rows, unit="file")]
    refused = [result for result in results if "refused" in result]
    for result in refused:
        print(ascii(result["refused"])[1:-1])
    if args.report:
        write_text(args.report, "".join(json.dumps(result) + "\n" for result in results))
    frames = sum(result.get("frames", 0) for result in results)
    slowest = max(results, key=lambda result: result["seconds"])
    print(
        f"{len(results) - len(refused)} of {len(results)} files read in full, {frames} frames; slowest {slowest['seconds']} s ({slowest['path']!a})"
    )
    return 1 if refused else 0

"""Write the captions of a manifest's clips by a vision-language model, of any kind that transformers has.

    stdit caption data/clips/manifest.jsonl --model path/to/Qwen2.5-VL-3B-Instruct
    stdit caption clips.csv --model FOLDER --prompt "Describe the motion in one sentence."

The model is a local folder: nothing is downloaded, and code in it is never run. Only captions that are missing are written;
those that are there stay. The same command goes on where it was stopped.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from stdit.data.backends import open_video
from stdit.data.captioner import PROMPT, Captioner
from stdit.data.manifest import Row, read_manifest
from stdit.data.media import VideoError, is_picture
from stdit.data.pictures import read_picture
from stdit.data.records import find_columns, read_rows, write_records
from stdit.files import check_writable, claimed, printable
from stdit.progress import Progress
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.models import default_device
from stdit.warn import warn_user

_SUFFIXES = (".jsonl", ".csv")
_LONG_SIDE = 768  # pixels of the frames that a model gets; models make them smaller yet


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the missing captions; exit code 1 if none could be written."""
    parser = command_parser("caption", __doc__)
    parser.add_argument("manifest", type=Path, help="a manifest (.jsonl or .csv), in which captions are filled in")
    parser.add_argument("--root", type=Path, help="folder that holds all clips (default: that of the manifest)")
    parser.add_argument("--model", required=True, type=Path, help="folder of a vision-language model of transformers")
    parser.add_argument("--prompt", default=PROMPT, help="what the model is asked")
    parser.add_argument("--frames", type=int, default=8, help="of a clip that the model sees (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=200, help="of a caption (default: %(default)s)")
    args = parser.parse_args(argv)
    check_least(args, "frames", "max_tokens")
    if args.manifest.is_dir() or args.manifest.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"{args.manifest} is no manifest with room for captions ({' or '.join(_SUFFIXES)}); stdit split writes one, and "
            "stdit check-media FOLDER --manifest clips.jsonl one of a folder."
        )
    table = read_manifest(args.manifest, args.root)
    check_writable(args.manifest)
    av.logging.set_level(None)
    with claimed([args.manifest]):
        return _caption(args, table.rows)


def _caption(args: Namespace, rows: Sequence[Row]) -> int:
    journal = args.manifest.with_name(f"{args.manifest.stem}.captions.jsonl")
    made = _read_journal(journal)
    captions = [row.caption or made.get(str(row.path), "") for row in rows]
    missing = [i for i, caption in enumerate(captions) if not caption]
    if not missing and not made:
        print(f"{args.manifest}: all {len(rows)} clips have a caption")
        return 0
    captioner = Captioner(args.model, default_device()) if missing else None
    failed = 0
    try:
        with open(journal, "a", encoding="utf-8") as stream:
            for i in Progress(missing, unit="clip", desc="captions"):
                assert captioner is not None
                path = str(rows[i].path)
                try:
                    made[path] = made.get(path) or captioner(
                        _frames(rows[i].path, args.frames), args.prompt, args.max_tokens
                    )
                except VideoError as error:
                    warn_user(f"no caption: {error}")
                    failed += 1
                    continue
                captions[i] = made[path]
                stream.write(json.dumps({"path": path, "caption": made[path]}) + "\n")
                stream.flush()
    finally:  # also of a call that is stopped
        _fill(args.manifest, captions)
    journal.unlink()
    written = sum(bool(captions[i]) for i in missing)
    empty = len(missing) - written - failed
    notes = [f"{failed} clips cannot be read"] * bool(failed) + [f"the model said nothing of {empty}"] * bool(empty)
    print(
        f"{args.manifest}: {written} captions written, {len(rows) - len(missing)} were there; {'; '.join(notes) or 'none is missing'}"
    )
    if written:
        print(f"the first: {printable(next(captions[i] for i in missing if captions[i]))!r}")
    return 0 if written or not missing else 1


def _frames(path: Path, count: int) -> list[np.ndarray]:
    """Up to `count` frames (H, W, 3) uint8, spread evenly over a clip; the picture itself of a picture."""
    if is_picture(path):
        return [read_picture(path)]
    with open_video(path) as reader:
        indices = np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int).tolist()
        scale = _LONG_SIDE / max(reader.size)
        size = None if scale >= 1 else (max(1, round(reader.size[0] * scale)), max(1, round(reader.size[1] * scale)))
        return list(reader.get_frames(indices, size))


def _read_journal(path: Path) -> dict[str, str]:
    """The captions by file of a call that was stopped; its last line may not have been written to its end."""
    if not path.is_file():
        return {}
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = [json.loads(line) for line in lines if line.strip()]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return {entry["path"]: entry["caption"] for entry in found}


def _fill(manifest: Path, captions: Sequence[str]) -> None:
    """Write the manifest with captions in their column; all else stays."""
    rows = [row for _, row in read_rows(manifest)]
    names = {name: None for row in rows for name in row}
    columns = [name for name, role in find_columns(names, str(manifest)).items() if role == "caption"]
    column = columns[0] if columns else "caption"
    filled: list[dict[str, Any]] = [{**row, column: caption} for row, caption in zip(rows, captions, strict=True)]
    write_records(manifest, filled)

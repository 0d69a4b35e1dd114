"""Draw clips of moving shapes as mp4 files, with a manifest that records the true motion of each.

stdit make-shapes --output data/shapes --num-clips 480 --seed 0

More clips of the same settings are added to those that a folder has.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stdit.data.shapes import CLASS_NAMES, COLORS, OBJECT_NAMES, draw, random_clip
from stdit.data.video_write import write_video
from stdit.files import write_text
from stdit.progress import Progress
from stdit.recipes.entry import check_least, command, command_parser
from stdit.rng import keyed_rng


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the clips that the folder does not have yet."""
    parser = command_parser("make-shapes", __doc__)
    parser.add_argument("--output", default="data/shapes", help="folder for the clips and manifest.jsonl")
    parser.add_argument("--num-clips", type=int, default=480, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--frames", type=int, default=17, help="of a clip")
    parser.add_argument("--size", type=int, default=64, help="pixels, at least 32")
    parser.add_argument(
        "--motion",
        choices=("straight", "bounce"),
        default="straight",
        help="straight: labels are shape and direction; bounce: colour and shape",
    )
    parser.add_argument("--fps", type=float, default=8, help="frames a second of the files")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="PAIR",
        help='pairs of colour and shape to leave out, for example "red circle"',
    )
    args = parser.parse_args(argv)
    check_least(args, "num_clips", "frames")
    check_least(args, "size", least=32)
    check_least(args, "seed", least=0)
    for pair in args.without:
        if pair not in OBJECT_NAMES:
            raise ValueError(
                f"--without {pair!r} is not a colour and a shape, such as 'red circle'; colours are {', '.join(COLORS)}."
            )
    output = Path(args.output)
    manifest, settings_file = output / "manifest.jsonl", output / "settings.json"
    settings = {key: value for key, value in vars(args).items() if key != "output" and (value or key != "without")}
    if args.motion == "bounce":
        settings["labels"] = "colour and shape"  # version 0.1.0 labelled directions, which change at every bounce
    lines: list[str] = []
    if manifest.is_file():
        found = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        if found == settings:
            print(f"{output} already has these clips; nothing is drawn.")
            return 0
        lines = manifest.read_text().splitlines()
        grown = {**found, "num_clips": args.num_clips}
        if grown != settings or not found["num_clips"] == len(lines) < args.num_clips:
            raise ValueError(
                f"{output} has clips of other settings ({found}); choose another --output, or remove the folder."
            )
    output.mkdir(parents=True, exist_ok=True)
    new = range(len(lines), args.num_clips)
    with ThreadPoolExecutor(4) as pool:  # encoders work without Python's lock
        drawn = [pool.submit(draw_clip, args, i, output) for i in new]
        try:
            lines += [json.dumps(one.result()) for one in Progress(drawn, unit="clip", desc="drawing")]
        except BaseException:  # Ctrl-C, too, does not wait for all others
            pool.shutdown(cancel_futures=True)
            raise
    # Without a manifest a folder is drawn anew, and with another number of rows than its settings say it is refused.
    if not manifest.is_file():
        write_text(settings_file, json.dumps(settings) + "\n")
    write_text(manifest, "\n".join(lines) + "\n")
    write_text(settings_file, json.dumps(settings) + "\n")
    print(
        f"{args.num_clips} clips of {args.frames} frames at {args.size} x {args.size} and their true motion: {manifest}"
    )
    return 0


def draw_clip(args: argparse.Namespace, index: int, output: Path) -> dict:
    """Draw clip `index`, a pure function of (seed, index), and write it; returns its row of the manifest."""
    shape = (index % len(CLASS_NAMES), args.frames, args.size, args.motion)
    clip, tries = random_clip(keyed_rng("sample", args.seed, index), *shape), 0
    while clip.object_name in args.without:
        tries += 1
        clip = random_clip(keyed_rng("sample", args.seed, index, tries), *shape)
    name = f"{index:06d}.mp4"
    write_video(output / name, draw(clip), fps=args.fps)
    return {"path": name, "label": clip.class_name, "caption": clip.caption, "truth": clip.truth()}

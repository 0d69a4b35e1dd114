"""Draw clips of moving shapes as mp4 files, with a manifest that records the truth of each.

stdit make-shapes --output data/shapes --num-clips 480 --seed 0
"""

import json
from pathlib import Path

from tqdm import tqdm

from stdit.data.shapes import CLASS_NAMES, COLORS, OBJECT_NAMES, draw, random_clip
from stdit.data.video_write import write_video
from stdit.recipes.entry import command_parser
from stdit.rng import keyed_rng


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("make-shapes", __doc__)
    parser.add_argument("--output", default="data/shapes", help="folder for the clips and manifest.jsonl")
    parser.add_argument("--num-clips", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="pixels, at least 32")
    parser.add_argument(
        "--motion",
        choices=("straight", "bounce"),
        default="straight",
        help="labels: shape and direction, or of what bounces colour and shape",
    )
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="PAIR", help='no clip shows such a pair, for example "red circle"'
    )
    args = parser.parse_args(argv)
    for name, least in (("num_clips", 1), ("frames", 1), ("size", 32), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small; use {least} or more.")

    for pair in args.without:
        if pair not in OBJECT_NAMES:
            raise ValueError(f"--without {pair!r} is no colour and shape; colours: {', '.join(COLORS)}.")
    output = Path(args.output)
    manifest = output / "manifest.jsonl"
    settings = {key: value for key, value in vars(args).items() if key != "output" and (value or key != "without")}
    if args.motion == "bounce":
        settings["labels"] = "colour and shape"  # folders of earlier versions have directions, which turn
    settings_file = output / "settings.json"
    if manifest.is_file():
        made = json.loads(settings_file.read_text()) if settings_file.is_file() else None
        if made == settings:
            print(f"{output} holds these clips already; kept.")
            return 0
        raise ValueError(f"{output} holds other clips ({made}); choose another --output, or remove it.")
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in tqdm(range(args.num_clips), unit="clip", desc="drawing"):
        shape = (i % len(CLASS_NAMES), args.frames, args.size, args.motion)
        clip, tries = random_clip(keyed_rng("sample", args.seed, i), *shape), 0
        while clip.object_name in args.without:
            tries += 1
            clip = random_clip(keyed_rng("sample", args.seed, i, tries), *shape)
        name = f"{i:06d}.mp4"
        write_video(output / name, draw(clip), fps=args.fps)
        rows.append(
            json.dumps({"path": name, "label": clip.class_name, "caption": clip.caption, "truth": clip.truth()})
        )
    settings_file.write_text(json.dumps(settings) + "\n")
    beside = manifest.with_suffix(".part")
    beside.write_text("\n".join(rows) + "\n")
    beside.replace(manifest)  # last: a folder with a manifest is complete
    print(f"{args.num_clips} clips of {args.frames} frames at {args.size} x {args.size} and their truth: {manifest}")
    return 0

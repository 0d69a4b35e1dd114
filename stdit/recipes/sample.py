"""Sample clips (or images) from a trained model, or continue and edit clips and images of your own.

stdit sample                                    newest model under models/
stdit sample --model models/quickstart --class-label "circle left" 7 --seed 3
stdit sample --model models/captions --caption "a red circle moves left" "a blue square moves up"
stdit sample --lora models/mine:0.8 models/other                (LoRAs, which stdit train made with train.lora.rank=16)
stdit sample --frames 1 --output picture.png
stdit sample --task animate --input picture.png --class-label "circle left"
stdit sample --task extend --input clip.mp4 --after 16 --before 16
stdit sample --task connect --input first.mp4 last.mp4 --frames 12
stdit sample --task loop --input clip.mp4 --frames 12
stdit sample --task interpolate --input clip.mp4 --factor 2
stdit sample --task inpaint --input clip.mp4 --mask mask.png        or, for outpainting, --height 64 --width 96
stdit sample --task extend --input clip.mp4 --after 16 --actions left left up stay      (a model with actions)
stdit sample --task edit --input clip.mp4 --strength 0.6 --class-label "square up"
"""

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from stdit.files import is_file_name
from stdit.labels import label_number
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.info import newest_model
from stdit.recipes.sample_tasks import TASKS, check_options
from stdit.sampling.labels import read_labels
from stdit.sampling.options import add_flags, options_from

_COUNTS = ("frames", "height", "width", "num_videos", "factor")


def check_labels(args: argparse.Namespace, model: Path) -> None:
    """Raise ValueError for a label that a model does not have, from its settings, before anything is loaded."""
    given = [*(args.class_label or []), *(args.negative_class_label or [])]
    if not given or not (model / "model_index.json").is_file():  # a run's checkpoint says so when it is loaded
        return
    known = read_labels(model)
    for label in given if known.num_classes else ():
        label_number(label, known.num_classes, known.class_names)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. ValueError for numbers out of range."""
    parser = command_parser("sample", __doc__)
    add = parser.add_argument
    add("--model", help="folder of a trained model, or of checkpoints; default: the newest under models/")
    add("--task", choices=TASKS, default="generate")
    add(
        "--lora",
        nargs="+",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRAs of the model, files or folders; several add up; SCALE: how much one counts (default: 1)",
    )
    add("--input", nargs="+", default=[], metavar="PATH", help="clips or pictures to start from")
    add("--after", type=int, default=0, help="extend: number of new frames after the clip")
    add("--before", type=int, default=0, help="extend: number of new frames before the clip")
    add("--mask", help="inpaint: a picture (or clip) of the clip's size, white where pixels are generated")
    add("--strength", type=float, default=0.6, help="edit: 0 changes nothing, 1 everything")
    add("--factor", type=int, default=2, help="interpolate: factor by which the frame rate grows")
    add(
        "--class-label",
        nargs="+",
        help="numbers or names, one clip for each; default: one clip per class (12 at most), or no label for tasks with --input",
    )
    add(
        "--actions",
        nargs="+",
        default=[],
        metavar="ACTION",
        help="for a model with actions: numbers or names of those that lead to the last frames, each for as many frames as one lasts",
    )
    add(
        "--negative-class-label",
        nargs="+",
        help="classes that guidance leads away from; one for all clips, or one each",
    )
    add(
        "--negative-caption",
        nargs="+",
        metavar="TEXT",
        help="texts that guidance leads away from; one for all clips, or one each",
    )
    add(
        "--caption",
        nargs="+",
        metavar="TEXT",
        help="text prompts, one clip for each; for a model trained with captions",
    )
    add(
        "--num-videos",
        type=int,
        help="number of clips in all, over which labels and captions go round; default: one for each of them, 4 of an "
        "unconditional model",
    )
    add(
        "--frames",
        type=int,
        help="generate, animate: frames of the clip (1 writes a png); connect, loop: new frames; else frames of the input",
    )
    add("--height", type=int, help="in pixels; default: as in training")
    add("--width", type=int, help="in pixels; default: as in training")
    add_flags(parser, seed=None)
    add(
        "--pos-scaling",
        help="positions at untrained sizes: none, or interpolate into the trained grid; default: the model's",
    )
    add("--gif", action="store_true", help="write gif instead of mp4")
    add("--output", help="a file (.mp4, .gif, .png) or a folder")
    add("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)
    check_least(args, *_COUNTS)
    if args.gif and args.output and is_file_name(args.output) and Path(args.output).suffix != ".gif":
        raise ValueError(f"--gif and --output {args.output} contradict each other; leave one of them out.")
    return args


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Sample clips and write them, each with a JSON file of its settings."""
    args = parse(argv)
    options_from(args)  # raises for wrong ones before the model is loaded, as does the next line
    check_options(args)
    model = Path(args.model) if args.model else newest_model()
    if not args.model:
        print(f"model: {model}, the newest; --model names another", file=sys.stderr)
    check_labels(args, model)
    from stdit.recipes.sampling import sample  # imports torch, which takes seconds

    sample(args, model)
    return 0

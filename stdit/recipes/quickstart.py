"""Draw moving shapes, encode them, train a video diffusion transformer, sample clips and show the video tasks.

    make quickstart          (stdit quickstart once the package is installed)

A second run of the same command resumes where the first stopped.
"""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from stdit.config import Config, load_typed
from stdit.data.video_write import to_uint8, write_contact_sheet, write_video
from stdit.evaluation.held_out import held_out
from stdit.evaluation.operations import mark_generated
from stdit.precision import native_bf16
from stdit.recipes import cache_latents, make_shapes, train
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import load_pipeline
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.run import RunFolders

CONFIG = "quickstart"


def show_tasks(pipe: STDiTPipeline, output: Path) -> None:
    """Write one clip and one strip of frames for each task, from drawn clips that are not in the training data."""
    data = held_out(4, pipe.config.num_frames, "straight", pipe.config.height, seed=3)
    first, name, options = data.pixels[:1], data.class_names[0], {"progress": False, "num_inference_steps": 20}
    results = {
        "extended": (pipe.extend(first[:, :, :5], after=12, class_labels=name, **options), slice(5, None)),
        "connected": (
            pipe.connect(data.pixels[1:2, :, :5], data.pixels[1:2, :, 13:], 8, data.class_names[1], **options), slice(5, 13)
        ),
        "loop": (pipe.loop(data.pixels[2:3, :, :5], 8, data.class_names[2], **options), slice(5, None)),
        "animated": (pipe.animate(data.pixels[3:4, :, 0], class_labels=data.class_names[3], **options), slice(1, None)),
    }  # fmt: skip
    strips = []
    for title, (clip, new) in results.items():
        write_video(output / f"{title}.mp4", clip[0], fps=pipe.config.fps)
        is_new = torch.zeros(clip.shape[2], dtype=torch.bool)
        is_new[new] = True
        strips.append(mark_generated(to_uint8(clip[0]), is_new))
    write_contact_sheet(output / "tasks.png", strips, count=9)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Draw the clips, encode them, train, and show samples and tasks."""
    parser = command_parser("quickstart", __doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the training config, as for stdit train"
    )
    parser.add_argument("--num-clips", type=int, default=4800, help="number of clips that are drawn")
    args = parser.parse_args(argv)
    began = time.time()
    config = load_typed(Config, CONFIG, args.overrides)
    if config.train.resume != "never":  # training would refuse it after all clips are drawn and encoded
        RunFolders(config.name).check_own_model()
    if not native_bf16():
        print("This CPU has no bfloat16 instructions: training runs in float32, and takes about twice as long.")
    print("1/4  drawing clips of moving shapes")
    make_shapes.main(["--output", "data/shapes", "--num-clips", str(args.num_clips)])
    print("2/4  encoding them with the tiny VAE")
    clips = ["data.root=data/shapes", "data.manifest=data/shapes/manifest.jsonl", "data.source=videos"]
    cache_latents.main([CONFIG, *clips, "--output", "data/shapes_latents"])
    print("3/4  training; samples appear in output/quickstart/samples during the run")
    code = train.run([CONFIG, *args.overrides])
    if code == 0 and args.overrides:
        print("4/4  the tasks are shown only without key=value; see stdit sample --help")
    elif code == 0:
        print("4/4  extending, connecting, looping and animating drawn clips")
        show_tasks(load_pipeline("models/quickstart"), Path("output/quickstart"))
        print("output/quickstart/tasks.png: extended, connected, loop, animated; an orange line marks new frames")
    if code == 0:
        print(
            f"done in {(time.time() - began) / 60:.1f} minutes. Look at output/quickstart/samples/contact_sheet.png, then try:"
        )
        print(f'  {_command()} sample --model models/quickstart --class-label "triangle up" --seed 1 --gif')
    return code


def _command() -> str:
    """The stdit command as it can be typed: its name, or its path if its virtual environment is not active."""
    script = Path(sys.executable).with_name("stdit")
    return "stdit" if shutil.which("stdit") or not script.is_file() else os.path.relpath(script)

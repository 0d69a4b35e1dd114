"""Sample clips (or images) from a trained model, or make new frames for clips and images of your own.

stdit sample                                    newest model under models/
stdit sample --model models/quickstart --class-label "circle left" 7 --frames 25 --seed 3
stdit sample --model models/captions --caption "a red circle moves left" "a blue square moves up"
stdit sample --frames 1 --output picture.png
stdit sample --task animate --input picture.png --class-label "circle left"
stdit sample --task extend --input clip.mp4 --after 16 --before 16
stdit sample --task connect --input first.mp4 last.mp4 --frames 12
stdit sample --task loop --input clip.mp4 --frames 12
stdit sample --task interpolate --input clip.mp4 --factor 2
stdit sample --task inpaint --input clip.mp4 --mask mask.png        or --height 64 --width 96: outpaint
stdit sample --task edit --input clip.mp4 --strength 0.6 --class-label "square up"
"""

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stdit.data.inputs import Input, read_input, read_mask
from stdit.data.video_write import WRITERS, VideoStream, write_video
from stdit.recipes.entry import command_parser
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.tasks import fits, outpaint_canvas


def newest_model(folder: Path = Path("models")) -> Path:
    """The model trained last; ValueError with the command that makes one."""
    found = [path.parent for path in folder.glob("[!.]*/model_index.json")]
    if not found:
        raise ValueError(
            f"There is no model under {folder}/; make one with: make quickstart   (or stdit train CONFIG)."
        )
    return max(found, key=lambda path: (path / "model_index.json").stat().st_mtime)


def output_paths(args: argparse.Namespace, model: Path, count: int, suffix: str, settings: dict) -> list[Path]:
    """One file a clip; none that exists is overwritten."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    if args.output and Path(args.output).suffix:
        given = Path(args.output)
        paths = (
            [given] if count == 1 else [given.with_name(f"{given.stem}-{i:03d}{given.suffix}") for i in range(count)]
        )
    else:
        folder = Path(args.output) if args.output else Path("output") / model.name / "samples"
        task = "" if args.task == "generate" else f"{args.task}-"
        paths = [folder / f"{task}{i:03d}-seed-{args.seed}-{digest}{suffix}" for i in range(count)]
    unknown = [path for path in paths if path.suffix.lower() not in WRITERS]
    if unknown:
        raise ValueError(f"--output {unknown[0]}: cannot write {unknown[0].suffix}; use one of {', '.join(WRITERS)}.")
    taken = [file for path in paths for file in (path, path.with_suffix(".json")) if file.exists()]
    if taken and not args.overwrite:
        raise ValueError(f"{taken[0]} exists; choose another --output or --seed, or pass --overwrite.")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def write_clips(paths: list[Path], clips: torch.Tensor | Iterable[torch.Tensor], fps: float) -> Iterator[tuple]:
    """Write clips (B, 3, F, H, W), or their parts (B, 3, f, H, W) as they come -> frames, height and width of each file."""
    if not isinstance(clips, torch.Tensor) and paths[0].suffix.lower() != ".mp4":
        clips = torch.cat(list(clips), dim=2)
    if isinstance(clips, torch.Tensor):
        for path, clip in zip(paths, clips, strict=True):
            write_video(path, clip, fps=fps)
            yield tuple(clip.shape[1:])
        return
    frames, size = 0, ()
    with ExitStack() as open_files:
        videos = [open_files.enter_context(VideoStream(path, fps)) for path in paths]
        for part in clips:
            frames, size = frames + part.shape[2], tuple(part.shape[3:])
            for video, clip in zip(videos, part, strict=True):
                video.add(clip)
    for _ in paths:
        yield (frames, *size)


def generate(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, labels, options: dict):
    return pipe(labels, args.frames, args.height, args.width, num_videos=args.num_videos, **options)


def inpaint(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, labels, options: dict):
    (given,) = inputs
    if args.mask:
        mask = read_mask(
            args.mask, given.source, tuple(given.pixels.shape[2:]), args.fps or pipe.config.fps, args.frames
        )
        return pipe.inpaint(given.pixels, mask, labels, **options)
    pixels, mask = outpaint_canvas(given.pixels, args.height or pipe.config.height, args.width or pipe.config.width)
    return pipe.inpaint(pixels, mask, labels, **options)


PLAIN = {"guidance_interval": (0.0, 1.0), "history_guidance": 1.0, "arrangement": "together", "every": 1, "blend": 0}
STREAMED = ("num_inference_steps", "guidance_scale", "seed", "solver", "fps", "captions")  # what pipe.stream takes


def extend(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, labels, options: dict):
    """At once; or, by a causal model, group after group as they are made, so that minutes need no more memory."""
    pixels, rest = inputs[0].pixels, {name: value for name, value in options.items() if name not in STREAMED}
    plain = all(value == PLAIN.get(name) for name, value in rest.items())
    if not pipe.transformer.config.causal or args.before or not plain or not fits(pipe.video_vae, pixels.shape[2]):
        return pipe.extend(pixels, args.after, args.before, labels, **options)
    chosen = {name: value for name, value in options.items() if name in STREAMED}
    made = pipe.stream(pixels, args.after, labels, **chosen)
    return chain([pixels], tqdm(made, "groups of frames", args.after // pipe.video_vae.stride[0]))


# What each task takes, and the call that does it: inputs, and the flags that are its own.
TASKS: dict[str, tuple[int, Callable, tuple[str, ...]]] = {
    "generate": (0, generate, ("frames", "num_videos")),
    "animate": (1, lambda p, x, a, y, o: p.animate(x[0].pixels, a.frames, y, **o), ("frames",)),
    "extend": (1, extend, ("after", "before", "frames")),
    "connect": (2, lambda p, x, a, y, o: p.connect(x[0].pixels, x[1].pixels, a.frames or 12, y, **o), ("frames",)),
    "loop": (1, lambda p, x, a, y, o: p.loop(x[0].pixels, a.frames or 12, y, **o), ("frames",)),
    "interpolate": (1, lambda p, x, a, y, o: p.interpolate(x[0].pixels, a.factor, y, **o), ("factor", "frames")),
    "inpaint": (1, inpaint, ("mask", "frames")),
    "edit": (1, lambda p, x, a, y, o: p.edit(x[0].pixels, a.strength, y, **o), ("strength", "frames")),
}
OWN = {"after": 0, "before": 0, "mask": None, "strength": 0.6, "factor": 2, "num_videos": 4}
COUNTS = ("frames", "height", "width", "num_videos", "factor", "every", "window", "overlap", "tile")  # 1 or more
STILL = ("inpaint", "edit")  # tasks that make of a picture a picture
FRAMES_TAKEN = ("extend", "interpolate", "inpaint", "edit")  # tasks where --frames shortens the input


def read_inputs(args: argparse.Namespace, pipe: STDiTPipeline) -> list[Input]:
    """The files named, at the model's size and rate; ValueError for a wrong number of them or a flag of another task."""
    count, _, flags = TASKS[args.task]
    for name, default in OWN.items():
        if getattr(args, name) != default and name not in flags:
            users = [task for task, (_, _, own) in TASKS.items() if name in own]
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} belongs to --task {' or '.join(users)}, not to {args.task}; leave it out.")
    if len(args.input) != count:
        raise ValueError(f"--task {args.task} takes {count} --input file(s), {len(args.input)} given.")
    trained = (pipe.config.height, pipe.config.width)
    size: Any = (args.height or trained[0], args.width or trained[1])
    if args.task == "inpaint" and not args.mask:  # the whole picture inside the larger frame
        size = partial(_inside, frame=size, trained=trained)
    if args.task == "inpaint" and not (args.mask or args.height or args.width):
        raise ValueError("--task inpaint needs a --mask, or room around the picture: a larger --height or --width.")
    frames = args.frames if args.task in FRAMES_TAKEN else None
    inputs = [read_input(path, size, args.fps or pipe.config.fps, frames) for path in args.input]
    for path, given in zip(args.input, inputs, strict=True):
        if given.note:
            print(f"{path}: {given.note}")
    return inputs


def _inside(source: tuple[int, int], frame: tuple[int, int], trained: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture that is to stand whole in a frame, no larger than it takes to cover what the model knows."""
    scale = min(
        *(f / s for f, s in zip(frame, source, strict=True)), max(t / s for t, s in zip(trained, source, strict=True))
    )
    return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("sample", __doc__)
    add = parser.add_argument
    add("--model", help="folder written by tools/train.py; default: the newest under models/")
    add("--task", choices=TASKS, default="generate")
    add("--input", nargs="+", default=[], metavar="PATH", help="clips or pictures that a task starts from")
    add("--after", type=int, default=0, help="extend: new frames behind")
    add("--before", type=int, default=0, help="extend: new frames in front")
    add("--mask", help="inpaint: a picture (or clip) of the clip's size, white where pixels are to be made")
    add("--strength", type=float, default=0.6, help="edit: 0 changes nothing, 1 everything")
    add("--factor", type=int, default=2, help="interpolate: times the frame rate")
    add("--class-label", nargs="+", help="numbers or names, one clip each; default: one of each class, for tasks none")
    add(
        "--caption",
        nargs="+",
        metavar="TEXT",
        help="what is to be seen, one clip each, of a model trained with captions",
    )
    add("--num-videos", type=int, default=4, help="clips of an unconditional model")
    add(
        "--frames",
        type=int,
        help="generate, animate: of the clip (1 writes a png); connect, loop: new ones; else of the input",
    )
    add("--height", type=int)
    add("--width", type=int)
    add("--fps", type=float, help="of what is written, and of what is read; default: as trained")
    add("--steps", type=lambda s: int(s) if s.isdecimal() else s, default=30, help="a number; for DDPM also ddim50")
    add("--guidance", type=float, default=2.0)
    add("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    add(
        "--guidance-channels",
        type=int,
        help="guide only the first so many latent channels (DiT's published samples: 3)",
    )
    add("--history-guidance", type=float, default=1.0, help="above 1: guide toward the known frames")
    add("--solver", help="euler, heun, ddim or ddpm; default: the model's")
    add("--arrangement", default="together", help="together, autoregressive or pyramid")
    add("--every", type=int, default=1, help="latent frames of a chunk, or steps between neighbours of a pyramid")
    add("--window", type=int, help="frames looked at at a time; default: as trained")
    add("--overlap", type=int, help="known frames in a window at most")
    add("--blend", type=int, default=0, help="known pixels this near to made ones fade into them")
    add("--tile", type=int, help="decode in tiles of so many latents")
    add(
        "--pos-scaling",
        help="of sizes never trained: none, or interpolate into the trained grid; default: the model's",
    )
    add("--seed", type=int, default=0)
    add("--gif", action="store_true", help="write gif instead of mp4")
    add("--output", help="a file (.mp4, .gif, .png) or a folder")
    add("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    for name in (*COUNTS, "fps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value} is none; use {'a positive number' if name == 'fps' else '1 or more'}.")
    if args.gif and args.output and Path(args.output).suffix not in ("", ".gif"):
        raise ValueError(f"--gif and --output {args.output} say different things; leave one of them out.")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    model = Path(args.model) if args.model else newest_model()
    pipe = STDiTPipeline.from_pretrained(str(model))
    if args.pos_scaling:
        pipe.transformer.set_pos_scaling(args.pos_scaling)
    if torch.cuda.is_available():
        pipe.to("cuda")
    inputs = read_inputs(args, pipe)
    plain, classes = args.task == "generate", pipe.transformer.num_classes
    words = args.caption
    labels = args.class_label or (list(range(min(classes, 12))) if classes and plain and not words else None)
    numbers = pipe.labels(labels, len(words or []) or (args.num_videos if plain else 1))
    count = len(numbers) if numbers is not None else len(words or []) or (args.num_videos if plain else 1)
    inputs = [given._replace(pixels=given.pixels.expand(count, -1, -1, -1, -1)) for given in inputs]
    options = {
        "num_inference_steps": args.steps, "guidance_scale": args.guidance, "guidance_interval": tuple(args.guidance_interval),
        "guidance_channels": args.guidance_channels, "history_guidance": args.history_guidance, "seed": args.seed,
        "solver": args.solver, "arrangement": args.arrangement, "every": args.every, "overlap": args.overlap,
        "blend": args.blend, "tile": args.tile, "fps": args.fps, **({"window": args.window} if args.window else {}),
        **({"captions": words} if words else {}),
    }  # fmt: skip
    settings = {
        "model": str(model), "task": args.task, "class_labels": labels, "num_frames": args.frames or (pipe.config.num_frames if plain else None),
        "height": args.height or pipe.config.height, "width": args.width or pipe.config.width, **options,
        **{name: getattr(args, name) for name in ("input", "pos_scaling", *OWN)},
    }  # fmt: skip
    still = settings["num_frames"] == 1 if plain else args.task in STILL and inputs[0].pixels.shape[2] == 1
    suffix = ".png" if still else ".gif" if args.gif else ".mp4"
    paths = output_paths(args, model, count, suffix, settings)
    fps = (args.fps or pipe.config.fps) * (args.factor if args.task == "interpolate" else 1)
    names = pipe.transformer.config.class_names
    with warnings.catch_warnings(record=True) as said:
        clips = TASKS[args.task][1](pipe, inputs, args, numbers, options)
        for i, (path, size) in enumerate(zip(paths, write_clips(paths, clips, fps), strict=True)):
            label = None if numbers is None else int(numbers[i])
            name = names[label] if names and label is not None and label < len(names) else label
            caption = words[i if len(words) > 1 else 0] if words else None
            made = {**settings, **dict(zip(("num_frames", "height", "width"), size, strict=True)), "fps": fps}
            path.with_suffix(".json").write_text(
                json.dumps({**made, "clip": i, "label": label, "label_name": name, "caption": caption}, indent=1) + "\n"
            )
    for text in dict.fromkeys(str(warning.message) for warning in said):
        print(f"warning: {text}")
    print(
        f"{model}: {args.task}, {count} clip(s), {' x '.join(map(str, size))} at {fps:g} fps, {args.steps} steps, guidance {args.guidance}: {paths[0].parent}"
    )
    return 0

"""Sample clips (or images) from a trained model.

python tools/sample_video.py                                    newest model under models/
python tools/sample_video.py --model models/quickstart --class-label "circle left" 7 --frames 25 --seed 3
python tools/sample_video.py --frames 1 --output picture.png
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch

from stdit.data.video_write import write_video
from stdit.sampling.pipeline import STDiTPipeline

TASKS = ("generate",)


def newest_model(folder: Path = Path("models")) -> Path:
    """The model trained last; ValueError with the command that makes one."""
    found = [path.parent for path in folder.glob("[!.]*/model_index.json")]
    if not found:
        raise ValueError(
            f"There is no model under {folder}/; make one with: make quickstart   (or python tools/train.py CONFIG)."
        )
    return max(found, key=lambda path: (path / "model_index.json").stat().st_mtime)


def output_paths(args: argparse.Namespace, model: Path, labels: list, suffix: str, settings: dict) -> list[Path]:
    """One file a clip; none that exists is overwritten."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    if args.output and Path(args.output).suffix:
        given = Path(args.output)
        if len(labels) == 1:
            paths = [given]
        else:
            paths = [given.with_name(f"{given.stem}-{i:03d}{given.suffix}") for i in range(len(labels))]
    else:
        folder = Path(args.output) if args.output else Path("output") / model.name / "samples"
        paths = [folder / f"{i:03d}-seed-{args.seed}-{digest}{suffix}" for i in range(len(labels))]
    taken = [path for path in paths if path.exists()]
    if taken and not args.overwrite:
        raise ValueError(f"{taken[0]} exists; choose another --output or --seed, or pass --overwrite.")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder written by tools/train.py; default: the newest under models/")
    parser.add_argument("--task", choices=TASKS, default="generate")
    parser.add_argument("--class-label", nargs="+", help="numbers or names, one clip each; default: one of each class")
    parser.add_argument("--num-videos", type=int, default=4, help="clips of an unconditional model")
    parser.add_argument("--frames", type=int, help="default: as trained; 1 writes a png")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--fps", type=float)
    parser.add_argument(
        "--steps", type=lambda s: int(s) if s.isdecimal() else s, default=30, help="a number; for DDPM also ddim50"
    )
    parser.add_argument(
        "--guidance-channels",
        type=int,
        help="guide only the first so many latent channels (DiT's published samples: 3)",
    )
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--solver", help="euler, heun, ddim or ddpm; default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gif", action="store_true", help="write gif instead of mp4")
    parser.add_argument("--output", help="a file (.mp4, .gif, .png) or a folder")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)

    model = Path(args.model) if args.model else newest_model()
    pipe = STDiTPipeline.from_pretrained(str(model))
    if torch.cuda.is_available():
        pipe.to("cuda")
    classes = pipe.transformer.num_classes
    labels = args.class_label or (list(range(min(classes, 12))) if classes else None)
    frames = pipe.config.num_frames if args.frames is None else args.frames
    settings = {
        "model": str(model), "task": args.task, "class_labels": labels, "num_frames": frames,
        "height": args.height or pipe.config.height, "width": args.width or pipe.config.width,
        "num_inference_steps": args.steps, "guidance_scale": args.guidance, "guidance_interval": list(args.guidance_interval),
        "guidance_channels": args.guidance_channels, "solver": args.solver, "seed": args.seed,
    }  # fmt: skip
    numbers = pipe.labels(labels, args.num_videos)
    count = len(numbers) if numbers is not None else args.num_videos
    suffix = ".png" if frames == 1 else ".gif" if args.gif else ".mp4"
    paths = output_paths(args, model, [None] * count, suffix, settings)
    clips = pipe(
        numbers, frames, args.height, args.width, args.steps, args.guidance, tuple(args.guidance_interval), args.seed,
        count, args.solver, guidance_channels=args.guidance_channels,
    )  # fmt: skip
    names = pipe.transformer.config.class_names
    for i, (path, clip) in enumerate(zip(paths, clips, strict=True)):
        write_video(path, clip, fps=args.fps or pipe.config.fps)
        label = None if numbers is None else int(numbers[i])
        name = names[label] if names and label is not None and label < len(names) else label
        path.with_suffix(".json").write_text(
            json.dumps({**settings, "clip": i, "label": label, "label_name": name}, indent=1) + "\n"
        )
    print(
        f"{model}: {count} clip(s), {settings['num_frames']} x {settings['height']} x {settings['width']}, {args.steps} steps, guidance {args.guidance}: {paths[0].parent}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))

"""Judge clips of moving shapes: does the model draw the shape it was asked for, and does it move as asked?

python tools/evaluate.py --model models/quickstart --clips 480
python tools/evaluate.py --input data/shapes/manifest.jsonl            the judge on drawn clips, against their truth
python tools/evaluate.py --model models/captions --captions "red circle" "blue square"      pairs that training left out
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sample_video import newest_model
from tqdm import tqdm

from stdit.data.manifest import read_manifest
from stdit.data.shapes import CLASS_NAMES, COLORS, SHAPES
from stdit.data.video_io import VideoReader
from stdit.data.video_write import to_uint8, write_contact_sheet
from stdit.evaluation.captions import asked, measure
from stdit.evaluation.shapes import judge, report, table
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.run import write_text


def generated(args: argparse.Namespace) -> tuple[list[np.ndarray], list[int], Path]:
    model = Path(args.model) if args.model else newest_model()
    pipe = STDiTPipeline.from_pretrained(str(model))
    if sorted(pipe.transformer.config.class_names or []) != sorted(CLASS_NAMES):
        raise ValueError(f"{model} was not trained on moving shapes; this judge knows only those.")
    if torch.cuda.is_available():
        pipe.to("cuda")
    labels = [i % len(CLASS_NAMES) for i in range(args.clips)]
    clips = pipe(
        [CLASS_NAMES[label] for label in labels], args.frames, args.size, args.size, args.steps, args.guidance, seed=args.seed, solver=args.solver
    )  # fmt: skip
    return [to_uint8(clip) for clip in clips], labels, Path("output") / model.name


def told(args: argparse.Namespace) -> int:
    """Captions: pairs that were seen, pairs that were left out."""
    model = Path(args.model) if args.model else newest_model()
    pipe = STDiTPipeline.from_pretrained(str(model))
    if torch.cuda.is_available():
        pipe.to("cuda")
    output = Path("output") / model.name
    output.mkdir(parents=True, exist_ok=True)
    options = {
        "num_inference_steps": args.steps, "guidance_scale": args.guidance, "seed": args.seed, "num_frames": args.frames,
        "height": args.size, "width": args.size,
    }  # fmt: skip
    every = {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    unknown = [pair for pair in args.captions if pair not in every]
    if unknown:
        raise ValueError(f"--captions {unknown[0]!r} is no colour and shape, such as 'red circle'.")
    results = {}
    for name, pairs in (("seen pairs", sorted(every - set(args.captions))), ("pairs left out", args.captions)):
        if pairs:
            result, clips = measure(pipe, asked(pairs, args.clips), **options)
            print(f"{name:<15} {result}", flush=True)
            results[name] = result._asdict()
            write_contact_sheet(output / f"captions-{name.replace(' ', '-')}.png", clips[:24], columns=2)
    write_text(output / "captions.json", json.dumps({**vars(args), **results}, indent=1) + "\n")
    print(f"{output / 'captions.json'}, contact sheets beside it")
    return 0


def recorded(manifest: Path) -> tuple[list[np.ndarray], list[int]]:
    """Clips of a manifest, and how far measurements are from the truth it records."""
    rows = read_manifest(manifest)
    truths = [json.loads(line).get("truth") for line in manifest.read_text().splitlines() if line.strip()]
    clips, errors = [], []
    for row, truth in zip(tqdm(rows.rows, unit="clip", desc="reading"), truths, strict=True):
        with VideoReader(row.path) as reader:
            clips.append(reader.get_frames(range(len(reader))))
        if truth:
            seen = judge(clips[-1])
            start = np.array(truth["start"]) - seen.centers[0]
            errors.append(
                [
                    np.hypot(*start),
                    abs(seen.speed - truth["speed"]),
                    abs(seen.size - truth["size"]),
                    np.abs(seen.color - truth["color"]).max(),
                ]
            )
    if errors:
        median, worst = np.median(errors, axis=0), np.max(errors, axis=0)
        for name, m, w in zip(
            ("start, px", "speed, px a frame", "size, px", "colour, 0..1"), median, worst, strict=True
        ):
            print(f"truth against judge, {name}: median error {m:.3f}, largest {w:.3f}")
    names = rows.class_names or []
    return clips, [CLASS_NAMES.index(names[row.label]) if names else row.label for row in rows.rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the newest under models/")
    parser.add_argument("--input", help="a manifest of clips to judge instead of a model")
    parser.add_argument(
        "--captions", nargs="*", metavar="PAIR", help="judge captions: of all pairs of colour and shape, and of these alone"
    )
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--solver")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.clips < 1:
        raise ValueError(f"--clips {args.clips} leaves nothing to judge; use 1 or more.")
    if args.captions is not None:
        return told(args)
    if args.input:
        clips, labels = recorded(Path(args.input))
        output = None
    else:
        clips, labels, output = generated(args)
    result = report(clips, labels)
    print(table(result))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "evaluation.json", json.dumps({**vars(args), **result._asdict()}, indent=1) + "\n")
        write_contact_sheet(output / "evaluation.png", clips[:48], columns=4)
        print(f"{output / 'evaluation.json'}, {output / 'evaluation.png'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(str(error))

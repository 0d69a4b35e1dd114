"""Measure whether clips of moving shapes show the shape and direction of their labels, and distances between any clips.

stdit evaluate --model models/quickstart --clips 480
stdit evaluate --input data/shapes/manifest.jsonl            drawn clips against the recorded truth
stdit evaluate --model models/NAME --reference data/clips --features inception=FILE     any model, against real clips
stdit evaluate --input made/ --reference data/clips --features i3d=FILE      clips against clips (--paired: also PSNR, SSIM)
stdit evaluate --model models/captions --captions "red circle" "blue square"      pairs that were left out of training
stdit evaluate --round-trip tiny --noise 0.3 --clips 96      drawn clips through a VAE, with noise on their latents
stdit evaluate --world --model models/room       a world beside its truth (see stdit evaluate --world --help)
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.manifest import read_manifest
from stdit.data.shapes import CLASS_NAMES, COLORS, SHAPES
from stdit.data.video_io import VideoReader
from stdit.data.video_write import to_uint8, write_contact_sheet
from stdit.evaluation.captions import caption_grid, sample_and_measure
from stdit.evaluation.features import distances, load_extractor
from stdit.evaluation.held_out import held_out
from stdit.evaluation.metrics import psnr, ssim
from stdit.evaluation.shapes import Report, measure_shape, report, table
from stdit.files import check_writable, write_json
from stdit.pixels import to_float
from stdit.progress import Progress
from stdit.recipes import evaluate_world
from stdit.recipes.against import AGAINST, print_differences, read_saved
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.info import newest_model
from stdit.recipes.models import default_device, load_pipeline
from stdit.rng import keyed_normal, keyed_rng
from stdit.sampling.options import Guider, SamplingOptions
from stdit.sampling.pipeline import STDiTPipeline
from stdit.vae import load_vae

# Arguments that say how a model is sampled, None where they are not given.
_SAMPLING = ("model", "steps", "guidance", "guider", "guidance_interval", "solver", "shift", "seed")
# What is measured, by the first of these arguments that is given, and the arguments without influence on it.
_WITHOUT_INFLUENCE = {
    "round_trip": (  # the seed draws the clips
        "the round trip of drawn clips",
        ("input", "captions", "reference", "features", "paired", "against", *_SAMPLING[:-1]),
    ),
    "captions": ("how captions are followed", ("input", "reference", "features", "paired", "against", "noise")),
    "reference": ("distances to a reference", ("against", "noise")),
    "input": ("the shapes of clips that are there", ("clips", "frames", "size", "features", "noise")),
    "model": ("the shapes of a model's clips", ("features", "noise")),
}


def measure_shapes(args: argparse.Namespace) -> int:
    """Measure clips of moving shapes, of a model or of a manifest; print the result, and write that of a model."""
    if args.input:
        saved = read_saved(args, "right") if args.against is not None else {}
        _report(*read_recorded(Path(args.input)), saved=saved, against=args.against)
        return 0
    model = Path(args.model) if args.model else newest_model()
    pipe = load_pipeline(model)
    if sorted(pipe.transformer.config.class_names or []) != sorted(CLASS_NAMES):
        raise ValueError(
            f"{model} was not trained on moving shapes, so shapes cannot be measured; compare it with real clips: --reference FOLDER."
        )
    output = _output(model)
    frames, size = args.frames or pipe.config.num_frames, args.size or pipe.config.height
    expected = {"seed": args.seed, "frames": frames, "size": size}
    saved = read_saved(args, "right", output / "evaluation.json", **expected) if args.against is not None else {}
    labels, options = [i % len(CLASS_NAMES) for i in range(args.clips)], _options(pipe, args)
    sampled = pipe([CLASS_NAMES[label] for label in labels], args.frames, args.size, args.size, options=options)
    clips = [to_uint8(clip) for clip in sampled]
    result = _report(clips, labels, saved=saved, against=args.against)
    settings = pipe.engine.resolved(options)
    settings |= {"guidance": settings.pop("guidance_scale"), "frames": frames, "size": size}
    write_json(output / "evaluation.json", {**vars(args), **settings, **result._asdict()})
    names = [CLASS_NAMES[label] for label in labels[:48]]
    write_contact_sheet(output / "evaluation.png", clips[:48], columns=4, names=names)
    print(f"{output / 'evaluation.json'}, {output / 'evaluation.png'}")
    return 0


def _report(clips: list[np.ndarray], labels: list[int], *, saved: dict[str, list], against: str) -> Report:
    """Measure clips and print their report, and the differences to those of a saved evaluation."""
    result = report(clips, labels)
    print(table(result))
    print_differences(((name, "%", right) for name, right in result.right.items()), saved, against)
    return result


@torch.no_grad()
def measure_round_trip(args: argparse.Namespace) -> int:
    """Measure held-out drawn clips after a VAE's encoder and decoder, with noise added to the normalised latents."""
    vae = load_vae(args.round_trip, key="--round-trip").to(default_device())
    data = held_out(args.clips, args.frames or 17, "straight", args.size or 64, seed=args.seed)
    labels, parts = [truth.label for truth in data.truths], []
    for first in Progress(range(0, args.clips, 32), unit="batch", desc="round trip"):
        latents = vae.encode(data.pixels[first : first + 32].to(vae.device)).float()
        keys: list[tuple[int, ...]] = [(args.seed, 0, first + i) for i in range(len(latents))]
        noise = keyed_normal("noise", keys, tuple(latents.shape[1:]))
        parts.append(vae.decode(latents + args.noise * noise.to(vae.device)).float().cpu())
    decoded = torch.cat(parts)
    drawn, result = (report([to_uint8(clip) for clip in clips], labels) for clips in (data.pixels, decoded))
    print(f"drawn clips: shape by fill {drawn.fill:.1%}, outline misfit {drawn.misfit:.1%}; decoded:")
    print(table(result))
    print(f"PSNR {psnr(decoded, data.pixels):.2f} dB")
    return 0


def _options(pipe: STDiTPipeline, args: argparse.Namespace) -> SamplingOptions:
    return SamplingOptions(
        num_inference_steps=args.steps, guidance_scale=_guidance(pipe, args), seed=args.seed, solver=args.solver,
        guider=args.guider, shift=args.shift, guidance_interval=args.guidance_interval,
    )  # fmt: skip


def _guidance(pipe: STDiTPipeline, args: argparse.Namespace) -> float:
    if args.guidance is not None:
        return args.guidance
    engine = pipe.engine
    guider = args.guider or engine.default_guider
    if engine.learnt_guidance is not None:
        return min(2.0 if guider == "auto" else 3.0, engine.learnt_guidance.scales.get(guider, 3.0))
    return 3.0 if engine.distilled_guidance == 1 and guider != "auto" else engine.default_guidance


def _output(model: Path) -> Path:
    """The output folder of a model, made; OSError, before anything is sampled, if it cannot be written."""
    output = Path("output") / model.name
    check_writable(output / "evaluation.json")
    return output


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for an argument that would have no influence on what is asked for."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    sampling = [name for name in _SAMPLING if name in given]
    if args.input and args.captions is None and sampling:
        raise ValueError(
            f"--{sampling[0].replace('_', '-')} is for sampling, and --input measures clips that are there; leave it out, or give "
            "--model in place of --input."
        )
    if args.paired and not (args.input and args.reference):
        raise ValueError("--paired compares --input with --reference, clip by clip; give both.")
    kind = next((name for name in _WITHOUT_INFLUENCE if name in given), "model")
    what, without = _WITHOUT_INFLUENCE[kind]
    unused = [name for name in without if name in given]
    if unused:
        raise ValueError(f"--{unused[0].replace('_', '-')} has no influence on {what}; leave it out.")
    check_least(args, "clips", "steps")
    check_least(args, "size", least=32 if kind == "round_trip" else 1)  # as make-shapes: smaller shapes have no outline
    check_least(args, "seed", "noise", least=0)
    check_least(args, "frames", least=1 if kind == "reference" else 2)  # one frame has no direction


def compare_with_reference(args: argparse.Namespace) -> int:
    """Measure the distances of the clips of a model, or of a folder, to real clips."""
    extractor = load_extractor(args.features)
    if args.input:
        output, batches, size = None, None, (args.frames or 17, args.size or 64)
    else:
        model = Path(args.model) if args.model else newest_model()
        pipe = load_pipeline(model)
        output, size = (
            _output(model),
            (args.frames or pipe.config.num_frames, args.size or pipe.config.height),
        )
        batches = _sampled(pipe, args, size)
    real = _read(args.reference, size, args.clips)
    made = batches if batches is not None else _read(args.input, size, args.clips)
    found: dict = {"extractor": extractor.name}
    if args.paired:
        sides = list(made), list(real)
        counts = [sum(map(len, side)) for side in sides]
        if counts[0] != counts[1]:
            raise ValueError(
                f"--paired needs as many clips on both sides, but --input has {counts[0]} and --reference {counts[1]}; give the "
                "same clips in the same order, or leave --paired out."
            )
        pairs = list(zip(*sides, strict=True))
        found |= {
            "PSNR, dB": psnr(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs])),
            "SSIM": float(np.mean([ssim(a, b) for a, b in pairs])),
        }
        made, real = (iter(side) for side in zip(*pairs, strict=True))
    result = distances(made, real, extractor)
    found |= dict(zip(result.names, (result.frechet, result.kernel), strict=True)) | {"clips": result.clips}
    for name, value in found.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    if output is not None:
        write_json(output / "distances.json", {**vars(args), **found})
        print(f"{output / 'distances.json'}")
    return 0


def _sampled(pipe: STDiTPipeline, args: argparse.Namespace, size: tuple[int, int]) -> Iterator[torch.Tensor]:
    classes, options = pipe.transformer.num_classes, replace(_options(pipe, args), progress=False)
    for first in Progress(range(0, args.clips, 32), unit="batch", desc="sampling"):
        count = min(32, args.clips - first)
        labels = [(first + i) % classes for i in range(count)] if classes else None
        chosen = replace(options, seed=args.seed + first)
        yield pipe(labels, size[0], size[1], size[1], num_videos=count, options=chosen)


def _read(source: str, size: tuple[int, int], most: int) -> Iterator[torch.Tensor]:
    """Yield the clips of a folder or manifest in batches (B, 3, F, H, W), in the order of their names or rows."""
    path = Path(source)
    root, manifest = (str(path.parent), str(path)) if path.is_file() else (source, None)
    config = DataConfig(root=root, manifest=manifest, num_frames=size[0], height=size[1], width=size[1])
    dataset = build_dataset(config)
    for first in range(0, min(most, len(dataset)), 32):
        rows = range(first, min(first + 32, most, len(dataset)))
        pixels = torch.stack([dataset.load(i, keyed_rng("sample", 0, i))["pixels"] for i in rows])
        yield to_float(pixels)


def evaluate_captions(args: argparse.Namespace) -> int:
    """Measure how often clips show the colour, shape and direction of their captions.

    Pairs of colour and shape that were left out of training (`--captions`) and all others are measured apart.
    """
    model = Path(args.model) if args.model else newest_model()
    pipe = load_pipeline(model)
    output = _output(model)
    given = {"options": _options(pipe, args), "num_frames": args.frames, "height": args.size, "width": args.size}
    every = {f"{color} {shape}" for color in COLORS for shape in SHAPES}
    unknown = [pair for pair in args.captions if pair not in every]
    if unknown:
        raise ValueError(f"--captions {unknown[0]!r} is not a colour and a shape, such as 'red circle'.")
    results = {}
    for name, pairs in (("trained pairs", sorted(every - set(args.captions))), ("pairs left out", args.captions)):
        if pairs:
            result, clips = sample_and_measure(pipe, caption_grid(pairs, args.clips), **given)
            print(f"{name:<15} {result}", flush=True)
            results[name] = result._asdict()
            write_contact_sheet(output / f"captions-{name.replace(' ', '-')}.png", clips[:24], columns=2)
    write_json(output / "captions.json", {**vars(args), **results})
    print(f"{output / 'captions.json'}, contact sheets next to it")
    return 0


def read_recorded(manifest: Path) -> tuple[list[np.ndarray], list[int]]:
    """Read the clips and labels of a manifest, and print how far measurements are from the truth that it records."""
    rows = read_manifest(manifest)
    truths = [json.loads(line).get("truth") for line in manifest.read_text().splitlines() if line.strip()]
    clips, errors = [], []
    for row, truth in zip(Progress(rows.rows, unit="clip", desc="reading"), truths, strict=True):
        with VideoReader(row.path) as reader:
            clips.append(reader.get_frames(range(len(reader))))
        if truth:
            measured = measure_shape(clips[-1])
            start = np.array(truth["start"]) - measured.centers[0]
            errors.append(
                [
                    np.hypot(*start),
                    abs(measured.speed - truth["speed"]),
                    abs(measured.size - truth["size"]),
                    np.abs(measured.color - truth["color"]).max(),
                ]
            )
    if errors:
        median, worst = np.median(errors, axis=0), np.max(errors, axis=0)
        for name, m, w in zip(
            ("start, px", "speed, px per frame", "size, px", "colour, 0..1"), median, worst, strict=True
        ):
            print(f"truth against measurement, {name}: median error {m:.3f}, largest {w:.3f}")
    names = rows.class_names or []
    if unknown := sorted(set(names) - set(CLASS_NAMES)):
        raise ValueError(
            f"the label {unknown[0]!r} is not a shape and a direction, and only those are measured here; for shapes that bounce "
            "use stdit evaluate-tasks --bounce."
        )
    labels = [row.label or 0 for row in rows.rows]
    return clips, [CLASS_NAMES.index(names[label]) if names else label for label in labels]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure a model or clips, print the result and write it to the output folder of the model."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--world" in arguments:
        return evaluate_world.main([argument for argument in arguments if argument != "--world"])
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--model", help="default: the newest under models/")
    parser.add_argument(
        "--input", help="a manifest (with --reference also a folder) of clips to measure instead of a model"
    )
    parser.add_argument(
        "--captions",
        nargs="*",
        metavar="PAIR",
        help="measure how well captions are followed: for these pairs of colour and shape, and for all others",
    )
    parser.add_argument("--reference", help="a folder or manifest of real clips: measure distances to them")
    parser.add_argument(
        "--features",
        help="features of the distances: vae (default), vae=PATH, inception=FILE, i3d=FILE, script=FILE or vjepa2=FOLDER (JEDi)",
    )
    parser.add_argument(
        "--paired", action="store_true", help="input and reference are the same clips in order: PSNR, SSIM"
    )
    parser.add_argument(
        "--round-trip",
        metavar="VAE",
        help="tiny, a folder or a hub id: measure held-out drawn clips after this VAE's encoder and decoder",
    )
    parser.add_argument(
        "--noise", type=float, help="standard deviation of noise on the latents of the round trip (default: 0)"
    )
    parser.add_argument("--clips", type=int, help="that are sampled, or read at most (default: 480)")
    parser.add_argument("--frames", type=int, help="of a clip; default: as in training")
    parser.add_argument("--size", type=int, help="height and width; default: as in training")
    parser.add_argument("--steps", type=int, help="of the solver (default: 30)")
    parser.add_argument(
        "--guidance", type=float, help="default: 3; 2 for a model with a guide, 1 for one that has learnt one scale"
    )
    parser.add_argument(
        "--guider", choices=get_args(Guider), help="what guidance leads away from; default: the model's"
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="noise levels that are guided; default: 0.5 1 for the guider auto of flow, 0 1 otherwise",
    )
    parser.add_argument("--solver", help="default: the model's")
    parser.add_argument("--shift", type=float, help="of noise levels toward noise (flow); default: the model's")
    parser.add_argument("--against", metavar="FILE", help=f"an evaluation.json {AGAINST}")
    parser.add_argument("--seed", type=int, help="of the noise (default: 1)")
    args = parser.parse_args(arguments)
    if "" in (args.input, args.reference, args.model, args.round_trip):
        raise ValueError(
            "--input, --reference, --model or --round-trip is empty; name a file or a folder, or leave it out."
        )
    _check_arguments(args)
    for name, default in {"steps": 30, "clips": 480, "seed": 1, "features": "vae", "noise": 0.0}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.round_trip is not None:
        return measure_round_trip(args)
    if args.captions is not None:
        return evaluate_captions(args)
    if args.reference:
        return compare_with_reference(args)
    return measure_shapes(args)

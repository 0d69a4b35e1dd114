"""Convert weights of DiT, SiT, Latte, U-ViT, MDT or diffusers into an stdit model with the same outputs, and back.

stdit convert DiT-XL-2-256x256.pt --from dit --output models/dit
stdit convert DiT-XL-2-256 --from diffusers --output models/dit      (a whole DiTPipeline folder)
stdit convert models/dit --to dit --output dit.pt
"""

from collections.abc import Sequence
from pathlib import Path

from stdit.checkpoint.convert import (
    atomic_output,
    describe,
    parse_settings,
    read_dit_pipeline,
    to_stdit,
    write_original,
)
from stdit.checkpoint.files import read_weights
from stdit.checkpoint.keymaps import FORMATS
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import load_start
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import load_vae


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert one model, in either direction."""
    parser = command_parser("convert", __doc__)
    parser.add_argument("source", help="a file of weights, or a folder")
    parser.add_argument(
        "--from", dest="origin", choices=sorted(FORMATS), help="convert into stdit: the format of the weights"
    )
    parser.add_argument("--to", dest="target", choices=sorted(FORMATS), help="convert from stdit: the format to write")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="model arguments that the tensors do not determine, such as num_heads=4",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="which weights to read from a training checkpoint that has both",
    )
    parser.add_argument("--vae", help="write a whole pipeline with this VAE, ready for stdit sample")
    parser.add_argument("--text-encoder", help="for a model with captions: a folder or hub id of its T5")
    args = parser.parse_args(argv)
    if args.text_encoder and not args.vae:
        raise ValueError(
            "--text-encoder is part of a whole pipeline, which needs a VAE; give --vae too, or leave it out."
        )
    if bool(args.origin) == bool(args.target):
        raise ValueError(
            "give either --from (into stdit) or --to (out of stdit), with a format: " + ", ".join(sorted(FORMATS)) + "."
        )
    whole = args.origin == "diffusers" and (Path(args.source) / "model_index.json").is_file()
    if args.vae and (args.target or whole):
        raise ValueError(
            "--vae does not fit: "
            + (
                "the source is a whole pipeline, which has its own VAE; leave --vae out."
                if whole
                else "--to writes weights only; leave --vae out."
            )
        )
    if args.target and args.settings:
        raise ValueError(
            "--set has an effect with --from only; with --to the model is written unchanged. Leave --set out."
        )
    if args.target:
        write_original(load_start(args.source, "source"), args.target, args.output)
        print(f"{args.target} weights: {args.output}")
        return 0

    source, settings = Path(args.source), parse_settings(args.settings)
    with atomic_output(args.output) as part:  # raises if the output exists, before any work
        if whole:
            folder = read_dit_pipeline(source)
            if folder.class_names:
                settings.setdefault("class_names", folder.class_names)
            converted = to_stdit(folder.weights, args.origin, settings)
            save(converted, folder.vae, folder.scheduler, part)
        else:
            converted = to_stdit(read_weights(source, args.weights), args.origin, settings)
            if args.vae:
                form = FORMATS[args.origin]
                scheduler = STDiTScheduler(
                    converted.objective, betas=form.betas, learn_sigma=converted.model.config.learn_sigma
                )
                save(converted, load_vae(args.vae, key="--vae"), scheduler, part, text_encoder=args.text_encoder)
            else:
                converted.model.save_pretrained(part)
        description = describe(converted)
    print(description)
    print(f"model: {args.output}")
    return 0


def save(converted, vae, scheduler, folder: Path, text_encoder: str | None = None) -> None:
    """Write a pipeline folder that by default samples at the size for which the weights were trained."""
    pipeline = STDiTPipeline(converted.model, vae, scheduler, objective=converted.objective, text_encoder=text_encoder)
    stride, (frames, height, width) = pipeline.video_vae.stride, converted.model.config.sample_size
    pipeline.register_to_config(
        num_frames=pipeline.video_vae.pixel_frames(frames), height=height * stride[1], width=width * stride[2]
    )
    pipeline.save_pretrained(folder)

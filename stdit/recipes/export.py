"""Write models/NAME from the newest checkpoint of a run, finished or not; the run may go on meanwhile.

stdit export quickstart                                          models/quickstart
stdit export checkpoints/quickstart/step-500 --output early      of one checkpoint, to a folder of your own
stdit export models/quickstart --lora models/mine:0.8 --output models/merged      a model with LoRAs in its weights
"""

from collections.abc import Sequence
from pathlib import Path

from stdit.nn.low_rank import merge_lora
from stdit.recipes.adapters import add_loras
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import (
    CHECKPOINTS,
    config_of,
    find_checkpoint,
    load_pipeline,
    pipeline_of,
    recorded_base,
)
from stdit.training.results import replace_lora, replace_model


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint, or a model with LoRAs merged into it."""
    parser = command_parser("export", __doc__)
    parser.add_argument(
        "run",
        metavar="NAME",
        help="name of a run, or a folder of checkpoints, or one step-N of it; with --lora a model",
    )
    parser.add_argument(
        "--lora", nargs="+", default=[], metavar="PATH[:SCALE]", help="LoRAs to add to the weights of the model NAME"
    )
    parser.add_argument(
        "--output", type=Path, help="default: models/NAME, which is replaced; with --lora it must be given"
    )
    args = parser.parse_args(argv)
    if args.output and args.output.exists():
        raise ValueError(f"{args.output} exists; choose another --output.")
    if args.lora:
        return _merge(args.run, args.lora, args.output)
    given = Path(args.run)
    folder = given if given.is_dir() else CHECKPOINTS / given.name
    if not folder.is_dir():
        known = sorted(path.name for path in CHECKPOINTS.glob("[!.]*") if path.is_dir())
        raise ValueError(
            f"there is no run {args.run!r} under {CHECKPOINTS}/; runs there are: {', '.join(known) or 'none'}."
        )
    checkpoint = find_checkpoint(folder)
    config = config_of(checkpoint)
    output = args.output or Path("models") / checkpoint.path.parent.name
    pipe = pipeline_of(checkpoint)
    if config.train.lora.rank is None:
        replace_model(pipe, output)
    else:
        replace_lora(pipe.transformer, output, config.init_from.path or "", recorded_base(checkpoint))
    print(f"{checkpoint.path}, averaged weights{'' if config.train.lora.rank is None else ' of the LoRA'}: {output}")
    return 0


def _merge(model: str, loras: Sequence[str], output: Path | None) -> int:
    """Write a model with LoRAs in its weights."""
    if output is None:
        raise ValueError("--lora makes another model; give its folder as --output.")
    pipe = load_pipeline(model).to("cpu")
    add_loras(pipe, loras)
    for part in filter(None, (pipe.transformer, pipe.guide)):
        merge_lora(part)
    replace_model(pipe, output)
    print(f"{model} with {', '.join(loras)}: {output}")
    return 0

"""Write models/NAME from the newest checkpoint of a run, finished or not; the run may go on meanwhile.

stdit export quickstart                                          models/quickstart
stdit export checkpoints/quickstart/step-500 --output early      of one checkpoint, to a folder of your own
"""

from collections.abc import Sequence
from pathlib import Path

from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import CHECKPOINTS, find_checkpoint, pipeline_of
from stdit.training.results import replace_model


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export one checkpoint."""
    parser = command_parser("export", __doc__)
    parser.add_argument("run", metavar="NAME", help="name of a run, or a folder of checkpoints, or one step-N of it")
    parser.add_argument("--output", type=Path, help="default: models/NAME, which is replaced")
    args = parser.parse_args(argv)
    given = Path(args.run)
    folder = given if given.is_dir() else CHECKPOINTS / given.name
    if not folder.is_dir():
        known = sorted(path.name for path in CHECKPOINTS.glob("[!.]*") if path.is_dir())
        raise ValueError(
            f"there is no run {args.run!r} under {CHECKPOINTS}/; runs there are: {', '.join(known) or 'none'}."
        )
    if args.output and args.output.exists():
        raise ValueError(f"{args.output} exists; choose another --output.")
    checkpoint = find_checkpoint(folder)
    output = args.output or Path("models") / checkpoint.path.parent.name
    replace_model(pipeline_of(checkpoint), output)
    print(f"{checkpoint.path}, averaged weights: {output}")
    return 0

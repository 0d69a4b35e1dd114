"""How well models have learnt each scheme of known frames: their loss on held-out moving shapes, by noise level, in seconds.

python tools/held_out_loss.py models/quickstart models/other --clips 96

A row below `shared` says that what is known helps; one above it, that the model has not learnt to use it.
"""

import argparse
import sys

import torch

from stdit.evaluation.learnt import losses_by_scheme
from stdit.evaluation.operations import held_out
from stdit.sampling.pipeline import STDiTPipeline


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.6, 0.8, 0.95], help="noise levels, 0 to 1")
    parser.add_argument("--motion", choices=["straight", "bounce"], default="straight")
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args(arguments)
    try:
        if args.clips < 1 or not all(0 < level <= 1 for level in args.levels):
            raise ValueError(
                f"--clips={args.clips} --levels={args.levels}: use 1 or more clips, levels above 0, at most 1."
            )
        for model in args.models:
            pipe = STDiTPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
            data = held_out(args.clips, pipe.config.num_frames, args.motion, pipe.config.height, args.seed)
            print(f"{model}\n{'level':10}" + "".join(f"{level:>9g}" for level in args.levels))
            for scheme, losses in losses_by_scheme(pipe, data, args.levels).items():
                print(f"{scheme:10}" + "".join(f"{loss:9.4f}" for loss in losses), flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print parameters and Gflops of every size and those of DiT's paper, or of one video model by axes and frame count.

stdit model-table
stdit model-table --size XL/2 --axes spatial temporal --frames 1 5 17 --latent 32 --channels 16
"""

import argparse
from collections.abc import Sequence

from stdit.model.config import SIZES, size_arguments
from stdit.model.cost import forward_cost
from stdit.recipes.entry import command, command_parser

# Peebles and Xie, table 4 and section 5: millions of parameters, Gflops (multiply-adds) at 256 px.
PAPER = {
    "S/2": (33, 6.06), "S/4": (33, 1.41), "S/8": (33, 0.36), "B/2": (130, 23.01), "B/4": (130, 5.56), "B/8": (131, 1.42),
    "L/2": (458, 80.71), "L/4": (458, 19.70), "L/8": (459, 5.01), "XL/2": (675, 118.64), "XL/4": (675, 29.05), "XL/8": (676, 7.39),
}  # fmt: skip
PAPER_512 = 524.60


def paper_table() -> str:
    """A table with one row per size: parameters and Gflops, as counted here and as in DiT's paper."""
    lines = [f"{'':<12}{'parameters':>14}{'with table':>14}{'paper':>8}{'Gflops':>10}{'paper':>9}{'off':>8}"]
    for size in (f"{name}/{patch}" for name in SIZES for patch in (2, 4, 8)):
        lines.append(_row(size, 32, *PAPER[size]))
    lines.append(_row("XL/2", 64, PAPER["XL/2"][0], PAPER_512))
    return "\n".join(lines)


def _row(size: str, latent: int, millions: int, gflops: float) -> str:
    cost = forward_cost(
        {**size_arguments(size), "num_classes": 1000, "in_channels": 4, "axes": ["spatial"]}, (1, latent, latent)
    )
    counted = cost.total / 1e9
    return (
        f"{size:<5}{latent * 8:>4} px {cost.parameters:>14,}{cost.parameters + cost.table:>14,}{millions:>6} M"
        f"{counted:>10.2f}{gflops:>9.2f}{100 * (counted / gflops - 1):>7.2f}%"
    )


def video_table(args: argparse.Namespace) -> str:
    """A table with one row per choice of axes and frame count: tokens, and Gflops per clip by kind of operation."""
    lines = []
    for axes in (args.axes, ["joint"]) if args.axes != ["joint"] else (["joint"],):
        for frames in args.frames:
            arguments = {**size_arguments(args.size), "num_classes": 0, "in_channels": args.channels, "axes": axes}
            cost = forward_cost(arguments, (frames, args.latent, args.latent))
            kinds = ", ".join(f"{kind} {value / 1e9:.2f}" for kind, value in cost.flops.items())
            lines.append(
                f"{args.size} {'+'.join(axes):<17}{frames:>4} latent frames {cost.tokens:>7} tokens {cost.total / 1e9:>10.2f} Gflops ({kinds})"
            )
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = command_parser("model-table", __doc__)
    parser.add_argument("--size", help="a video model of this size, instead of the paper's table")
    parser.add_argument("--axes", nargs="+", default=["spatial", "temporal"])
    parser.add_argument("--frames", nargs="+", type=int, default=[1, 5, 9, 17], help="latent frames")
    parser.add_argument("--latent", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--channels", type=int, default=16, help="of the latents")
    args = parser.parse_args(argv)
    print(video_table(args) if args.size else paper_table())
    return 0

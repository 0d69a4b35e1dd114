"""How well models have learnt each scheme of known frames: their loss on held-out moving shapes, by noise level, in seconds.

stdit held-out-loss models/quickstart models/other --clips 96

A row below `shared` says that what is known helps; one above it, that the model has not learnt to use it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stdit.data.loader import Batch
from stdit.diffusion.levels import MASK_STRATEGIES
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.evaluation.operations import HeldOut, held_out, told
from stdit.prompt import Prompt
from stdit.recipes.entry import command_parser
from stdit.recipes.models import load_pipeline
from stdit.training.step import diffusion_losses, to_latents


@torch.no_grad()
def losses_by_scheme(pipe: Any, data: HeldOut, levels: list[float], seed: int = 0) -> dict[str, list[float]]:
    """The mean loss of what is to be predicted at each of `levels` (0..1), for each scheme that takes frames as known."""
    frames = ((data.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    keys = [(seed, 0, slot) for slot in range(len(frames))]
    batch = Batch(frames, None, None, torch.zeros(len(frames)), keys, {}, len(frames), None, [""] * len(frames))
    clips = to_latents(batch, pipe.video_vae)
    labels = pipe.labels(told(pipe, data).get("class_labels"), len(frames))
    prompt = Prompt(labels).each(lambda x: x.to(pipe.device))
    found: dict[str, list[float]] = {}
    for name, scheme in MASK_STRATEGIES.items():
        if (
            scheme.taught
            or scheme.independent
            or (scheme.supports_patch_levels and not pipe.transformer.supports_patch_levels)
        ):
            continue
        objective = build_objective(ObjectiveConfig(pipe.config.objective, name))
        found[name] = []
        for level in levels:

            def at(generator: torch.Generator, count: int, tokens: int, level: float = level) -> Tensor:
                return torch.full((count,), level)

            objective.draw_levels = at  # type: ignore[method-assign]
            loss = diffusion_losses(pipe.transformer, objective, clips, prompt, keys, pipe.transformer.patch_size)
            found[name].append(loss.clips.mean().item())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("held-out-loss", __doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.6, 0.8, 0.95], help="noise levels, 0 to 1")
    parser.add_argument("--motion", choices=["straight", "bounce"], default="straight")
    parser.add_argument("--seed", type=int, default=77)
    args = parser.parse_args(argv)
    if args.clips < 1 or not all(0 < level <= 1 for level in args.levels):
        raise ValueError(f"--clips={args.clips} --levels={args.levels}: --clips must be >= 1, levels in (0, 1].")
    for model in args.models:
        pipe = load_pipeline(model)
        data = held_out(args.clips, pipe.config.num_frames, args.motion, pipe.config.height, args.seed)
        print(f"{model}\n{'level':10}" + "".join(f"{level:>9g}" for level in args.levels))
        for strategy, losses in losses_by_scheme(pipe, data, args.levels).items():
            print(f"{strategy:10}" + "".join(f"{loss:9.4f}" for loss in losses), flush=True)
    return 0

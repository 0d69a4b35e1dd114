"""Measure the loss of models on held-out moving shapes, for each mask strategy and noise level.

stdit held-out-loss models/quickstart models/other --clips 96

A loss below that of `shared` shows that the model uses the known frames of a strategy; a higher loss, that it does not.
"""

from collections.abc import Sequence
from typing import Any

import torch

from stdit.conditions.values import map_tensors
from stdit.data.loader import Batch
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.evaluation.held_out import HeldOut, held_out, label_kwargs
from stdit.pixels import to_bytes
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.models import load_pipeline
from stdit.training.step import diffusion_losses, to_latents


@torch.no_grad()
def losses_by_strategy(pipe: Any, data: HeldOut, levels: list[float], seed: int = 0) -> dict[str, list[float]]:
    """The mean loss on generated frames at each of `levels` (0 to 1), for mask strategies without levels per frame."""
    keys = [(seed, 0, slot) for slot in range(len(data.pixels))]
    clips = to_latents(
        Batch(to_bytes(data.pixels), None, None, conditions={}, keys=keys, bad={}, total=len(keys)), pipe.video_vae
    )
    labels = label_kwargs(pipe, data).get("class_labels")
    model = pipe.transformer
    conditions = {
        name: c.parse(labels if name == "label" else None, len(keys)) for name, c in model.conditioners.items()
    }
    conditions = map_tensors(conditions, lambda x: x.to(pipe.device))
    objective = build_objective(ObjectiveConfig(pipe.config.objective))
    found: dict[str, list[float]] = {}
    for name, strategy in MASK_STRATEGIES.items():
        if strategy.level_per_frame or (strategy.per_patch and not model.supports_patch_levels):
            continue
        losses = [
            diffusion_losses(
                model, objective, clips, conditions, keys=keys, patch=model.patch_size, level=level, strategy=name
            )
            for level in levels
        ]
        found[name] = [loss.clips.mean().item() for loss in losses]
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of losses for each model."""
    parser = command_parser("held-out-loss", __doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--clips", type=int, default=96, help="that are drawn")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.4, 0.6, 0.8, 0.95], help="noise levels, 0 to 1")
    parser.add_argument("--motion", choices=["straight", "bounce"], default="straight")
    parser.add_argument("--seed", type=int, default=77, help="of clips and noise")
    args = parser.parse_args(argv)
    check_least(args, "clips")
    check_least(args, "seed", least=0)
    if not all(0 < level <= 1 for level in args.levels):
        raise ValueError(f"--levels must be > 0 and <= 1, got {args.levels}.")
    for model in args.models:
        pipe = load_pipeline(model)
        data = held_out(args.clips, pipe.config.num_frames, args.motion, pipe.config.height, seed=args.seed)
        print(f"{model}\n{'level':10}" + "".join(f"{level:>9g}" for level in args.levels))
        for strategy, losses in losses_by_strategy(pipe, data, args.levels).items():
            print(f"{strategy:10}" + "".join(f"{loss:9.4f}" for loss in losses), flush=True)
    return 0

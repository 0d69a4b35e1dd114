"""What a model has learnt of each scheme of known frames, in seconds: its loss on held-out clips, without sampling."""

from typing import Any

import torch
from torch import Tensor

from stdit.data.loader import Batch
from stdit.diffusion.levels import SCHEMES
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.evaluation.operations import Set, told
from stdit.prompt import Prompt
from stdit.training.step import diffusion_losses, to_latents


@torch.no_grad()
def losses_by_scheme(pipe: Any, data: Set, levels: list[float], seed: int = 0) -> dict[str, list[float]]:
    """The mean loss of what is to be predicted at each of `levels` (0..1), for each scheme that takes frames as known."""
    frames = ((data.pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    keys = [(seed, 0, slot) for slot in range(len(frames))]
    batch = Batch(frames, None, None, torch.zeros(len(frames)), keys, {}, len(frames), None, [""] * len(frames))
    clips = to_latents(batch, pipe.video_vae)
    labels = pipe.labels(told(pipe, data).get("class_labels"), len(frames))
    prompt = Prompt(labels).each(lambda x: x.to(pipe.device))
    found: dict[str, list[float]] = {}
    for name, scheme in SCHEMES.items():
        if scheme.taught or scheme.independent or (scheme.by_patch and not pipe.transformer.by_patch):
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

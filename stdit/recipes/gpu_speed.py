"""The speed of training steps on a device: seconds, operations, the share of the device's peak, memory."""

import math
from collections.abc import Callable
from typing import Any

import torch

from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.model.cost import Shape, flops_of_config
from stdit.model.stdit import STDiT
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.precision import autocast
from stdit.recipes.machine import Machine, gib
from stdit.training.compiled import compile_blocks
from stdit.training.optim import build_optimizers
from stdit.training.step import LatentBatch, diffusion_losses

Clips = tuple[int, Shape]  # a number of clips, and the (T, h, w) of their latents


def image_batch(machine: Machine) -> Clips:
    """The batch of images of 256 px at which DiT-XL/2 is measured."""
    return machine.pick((32, (1, 32, 32)), (2, (1, 8, 8)))


def training_step(
    machine: Machine,
    arguments: dict[str, Any],
    clips: Clips,
    *,
    checkpointing: bool | str = False,
    compiled: bool = False,
) -> Callable[[], None]:
    """A step of AdamW in bfloat16 on random latents; made with its model on the device."""
    batch, latent = clips
    with torch.device(machine.device):
        model = STDiT(**{**arguments, "sample_size": latent})
    if checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[checkpointing])
    if compiled:
        compile_blocks(model, backend=machine.compiler)
    learns = bool(model.config.learn_sigma)
    objective = build_objective(ObjectiveConfig(name="ddpm", learn_sigma=learns) if learns else ObjectiveConfig())
    [optimizer] = build_optimizers(model, "adamw", 1e-4)
    x = torch.randn((batch, arguments["in_channels"], *latent), device=machine.device)
    y = torch.randint(0, arguments["num_classes"], (batch, 1), device=machine.device)
    taken = 0

    def step() -> None:
        nonlocal taken
        keys = [(0, taken, slot) for slot in range(batch)]
        taken += 1
        with autocast("bf16", machine.device):
            losses = diffusion_losses(model, objective, [LatentBatch(x)], {"label": y}, keys=keys)
        losses.clips.mean().backward()
        optimizer.step()
        model.zero_grad()

    return step


def step_report(machine: Machine, arguments: dict[str, Any], clips: Clips, **how: Any) -> str:
    """What a training step takes, as text; how: keywords of `training_step`. Recomputed operations are not counted."""
    step = training_step(machine, arguments, clips, **how)
    seconds = machine.seconds(step, rounds=machine.pick(10, 2), warmup=machine.pick(3, 1))
    peak = machine.peak(step)
    batch, latent = clips
    tokens = batch * math.prod(latent) // math.prod(arguments["patch_size"])
    flops = 6 * batch * flops_of_config({**arguments, "sample_size": latent}, latent)
    rate = machine.rate(flops, seconds)
    return f"{batch} x {list(latent)}, {tokens} tokens: {seconds:.3g} s a step, {rate}, {gib(peak)} beside the weights"

"""What cannot be sampled, said before any work; and what a model was not trained for."""

import warnings
from typing import TYPE_CHECKING

from torch import Tensor

from stdit.sampling.schedule import ARRANGEMENTS
from stdit.sampling.solvers import SOLVERS
from stdit.sampling.tasks import Canvas, fits
from stdit.vae import VideoVAE
from stdit.vae.tiling import overlap_of
from stdit.variants import pick

if TYPE_CHECKING:
    from stdit.sampling.sampler import Sampler


def check(sampler: "Sampler", canvas: Canvas, length: int, seed: int) -> None:
    """ValueError in one line for what this pipeline cannot fill; length: the frames of a window, or of a whole stream."""
    pipe, (height, width) = sampler.pipe, canvas.pixels.shape[3:]
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more.")
    pipe.video_vae.latent_shape(length, height, width, pipe.transformer.patch_size)
    _check_choices(sampler)
    _check_scheduler(sampler, canvas)
    if canvas.made.shape[1] > 1 and not pipe.transformer.supports_patch_levels:
        raise ValueError(
            "a mask gives each patch a level of its own, and this model takes levels by frame; mask whole frames, or use a "
            "model of conditioning adaln_zero and trunk stack."
        )
    closed = ~canvas.made.flatten(1).any(1)
    if pipe.transformer.config.causal:
        if bool((closed[1:] & ~closed[:-1]).any()):
            raise ValueError(
                "this model is causal: it cannot see the known frames that follow what is to be made; use a model trained "
                "without model.causal, or extend a clip by after=."
            )
        if sampler.goes_forward(canvas):
            _check_stream(sampler)
            _warn_of_length(sampler, max(length, canvas.pixels.shape[2]))
    _warn_of_schemes(list(pipe.config.mask_strategies), canvas, closed, bool(pipe.transformer.config.causal))
    if sampler.guidance.history != 1 and not closed.any():
        warnings.warn(
            "history_guidance leads toward known frames, and none is known here: it does nothing.", stacklevel=5
        )


def check_window(window: int, canvas: Canvas, vae: VideoVAE) -> None:
    """ValueError for a window (in frames) that this VAE's groups do not fill, or that can go no further."""
    step, closed = vae.temporal_granularity or vae.stride[0], ~canvas.made.flatten(1).any(1)
    first = int(closed.int().argmax()) if closed.any() else 0  # a head before known frames is made from behind
    least = 1 + (2 if first or bool((closed[1:] & ~closed[:-1]).any()) else 1) * step
    if not fits(vae, max(window, 1)) or window < min(len(closed), least):
        near = next(n for n in range(max(window, least), max(window, least) + step + 1) if fits(vae, n))
        raise ValueError(
            f"window={window} does not hold a first frame, what is known and what is made in whole groups of VAE "
            f"{vae.name!r}; use window={near}."
        )


def _check_choices(sampler: "Sampler") -> None:
    channels, guided_channels = sampler.pipe.video_vae.channels, sampler.guidance.channels
    if isinstance(sampler.steps, int) and sampler.steps < 1:
        raise ValueError(f"num_inference_steps={sampler.steps} makes no picture; use 1 or more.")
    if sampler.solver is not None:
        pick(SOLVERS, sampler.solver, "solver")
    pick(ARRANGEMENTS, sampler.arrangement, "arrangement")
    if sampler.every < 1:
        raise ValueError(f"every={sampler.every} is no number of frames or steps; use 1 or more.")
    if sampler.every > 1 and sampler.arrangement == "together":
        raise ValueError(
            f"every={sampler.every} counts a chunk's frames or a pyramid's steps, arrangement='together' has neither; leave it "
            "out, or use arrangement='autoregressive' or 'pyramid'."
        )
    if guided_channels is not None and not 1 <= guided_channels <= channels:
        raise ValueError(f"guidance_channels={guided_channels} is outside the latents' 1 to {channels} channels.")
    for name, scale in (("guidance_scale", sampler.guidance.scale), ("history_guidance", sampler.guidance.history)):
        if not 0 <= scale < float("inf"):
            raise ValueError(f"{name}={scale} is no scale; use 0 or more, 1 for none.")
    low, high = sampler.guidance.interval
    if not 0 <= low <= high:
        raise ValueError(f"guidance_interval=({low:g}, {high:g}) is no stretch of levels; use 0 <= low <= high.")
    if sampler.blend is not None and sampler.blend < 0:
        raise ValueError(f"blend={sampler.blend} is negative; use 0 to leave known pixels as they are.")
    if sampler.tile is not None:
        overlap_of(sampler.tile)
    if sampler.fps is not None and not 0 < sampler.fps < float("inf"):
        raise ValueError(f"fps={sampler.fps} is not a frame rate; use a positive number.")


def _check_scheduler(sampler: "Sampler", canvas: Canvas) -> None:
    plain = bool(canvas.made.all()) and canvas.strength == 1 and sampler.arrangement == "together"
    brings = type(sampler.pipe.scheduler).__name__
    if sampler.foreign and not plain:
        raise ValueError(
            "this task holds frames at levels of their own, which is for stdit's own solvers; this model brings "
            f"{brings}: add solver='ddim' (--solver ddim)."
        )
    if sampler.foreign and not isinstance(sampler.steps, int):
        raise ValueError(
            f"num_inference_steps={sampler.steps!r} is for stdit's own solvers, this model brings {brings}; use a number, "
            "or add solver='ddim' (--solver ddim)."
        )


def _check_stream(sampler: "Sampler") -> None:
    """Frame after frame with a cache, some choices have no meaning."""
    guidance = sampler.guidance
    asked = {
        "history_guidance": (guidance.history, 1.0),
        "guidance_interval": (tuple(guidance.interval), (0.0, 1.0)),
        "arrangement": (sampler.arrangement, "together"),
        "tile": (sampler.tile, None),
    }
    unmet = [f"{name}={value}" for name, (value, plain) in asked.items() if value != plain]
    if unmet:
        raise ValueError(
            f"a causal model goes on frame by frame, each the same way: leave out {', '.join(unmet)}, or use a model "
            "trained without model.causal."
        )


def _warn_of_length(sampler: "Sampler", frames: int) -> None:
    config, trained = sampler.pipe.transformer.config, sampler.pipe.config.num_frames
    if config.window is None and frames > trained:
        warnings.warn(
            f"this causal model was trained on {trained} frames without a window: for {frames} its cache grows with every "
            "frame, and it sees further back than it learnt; train with model.window for minutes.",
            stacklevel=6,
        )


def _warn_of_schemes(trained: list[str], canvas: Canvas, closed: Tensor, causal: bool) -> None:
    """Known frames or patches at places where this model never saw any."""
    if canvas.made.all() or not canvas.made.any():
        return
    gaps = int((closed[:-1] & ~closed[1:]).sum())
    if canvas.made.shape[1] > 1:
        fitting = ["region"]
    elif causal or (closed[0] and not closed[-1]):
        fitting = ["prefix", "motion", "random", "teacher_forcing"]
    elif closed[-1] and not closed[0]:
        fitting = ["suffix", "random"]
    elif not closed[0]:
        fitting = ["random"]
    else:
        fitting = ["ends" if gaps == 1 else "every_kth", "random"]
    if canvas.made.shape[1] == 1:
        fitting.append("per_frame")  # any frame has been cleaner than any other
    if not set(fitting) & set(trained):
        warnings.warn(
            f"this model was trained with objective.mask_strategy={', '.join(trained)} and has not seen known frames where this "
            f"task has them (as {' or '.join(fitting)} show them): expect seams; train with objective.mask_strategy=mixed.",
            stacklevel=6,
        )

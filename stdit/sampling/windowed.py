"""Fill a canvas window by window; frames that one window generates are known frames of the next."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from stdit import legacy
from stdit.conditions import Guided
from stdit.sampling.canvas import Canvas
from stdit.sampling.conditioning import (
    clamp_to_bounds,
    encode_known,
    initial_schedule,
    latent_masks,
    paste,
    pixel_guided,
)  # fmt: skip
from stdit.sampling.engine import Engine, Keys, Size
from stdit.sampling.options import SamplingOptions
from stdit.sampling.schedule import make_schedule
from stdit.sampling.solvers import solve
from stdit.sampling.steps import OnStep, SteeredDenoiser
from stdit.sampling.windows import WindowSize, windows_of

__getattr__ = legacy.aliases(__name__)

# Key of the noise that replaces known frames in history guidance; smaller keys are those of solver steps.
_NOISED_CONTEXT = 2**31


@dataclass(frozen=True)
class WindowedSampler:
    """Generates all frames of a window at once, and long canvases in several windows that overlap.

    noise: what a canvas of one window starts from, (B, C, T, h, w); None: drawn by key. on_step: called after every step.
    """

    engine: Engine
    options: SamplingOptions
    window: WindowSize
    noise: Tensor | None = None
    on_step: OnStep | None = None

    def fill(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """Generate the pixels that `canvas.mask` marks; returns pixels (B, 3, F, H, W) of the whole canvas.

        given: conditions of the clips, those per latent frame for the latent frames of `canvas.output`.
        """
        engine, stride, frames = self.engine, self.engine.vae.stride[0], canvas.pixels.shape[2]
        output = canvas.output_frames
        canvas = canvas.lengthened(self.window.length)
        pixels, mask = canvas.pixels.clone(), canvas.mask.clone()
        windows = windows_of(mask.flatten(1).any(1), self.window, stride=stride)
        show = self.options.progress if len(windows) > 1 else False
        for number, window in enumerate(engine.progress(windows, show)):
            view = slice(window.begin, window.end)
            bounds = None if canvas.bounds is None else canvas.bounds[:, :, :, view]
            part = canvas._replace(pixels=pixels[:, :, view], mask=mask[view], bounds=bounds)
            latent_frames = (window.end - window.begin - 1) // stride + 1
            shown = [window.begin + j * stride - output.start for j in range(latent_frames)]
            # The first window has the keys of a canvas that needs one window only.
            done = self.fill_window(
                part,
                engine.conditions_at(given, shown, len(output), starts=True),
                [(*key, number) for key in keys] if number else keys,
            )
            keep = slice(window.keep_from, window.keep_to)
            pixels[:, :, keep] = done[:, :, keep.start - window.begin : keep.stop - window.begin]
            mask[keep] = False
        return pixels[:, :, :frames]

    def latent_shape(self, canvas: Canvas) -> Size:
        """The shape (T, h, w) of a canvas's latents; ValueError unless one window holds it."""
        frames, height, width = canvas.pixels.shape[2:]
        if frames > self.window.length:
            raise ValueError(
                f"latents are those of one window, but {frames} frames take several of {self.window.length}; use window={frames} or "
                "more, fewer frames, or pixels."
            )
        return self.engine.latent_shape((self.window.length, height, width))

    def latents(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """The latents (B, C, T, h, w) of a canvas that one window holds, as `fill` would decode them."""
        frames = canvas.output_frames
        canvas = canvas.lengthened(self.window.length)
        shown = list(range(0, canvas.pixels.shape[2], self.engine.vae.stride[0]))
        given = self.engine.conditions_at(given, shown, len(frames), starts=True)
        return self.sample_window(canvas, given, keys)

    def fill_window(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """Generate one window -> pixels (B, 3, F, H, W); known ones are unchanged unless `paste` or `blend` is set."""
        options = self.options
        latents = self.sample_window(canvas, given, keys)
        decoded = clamp_to_bounds(self.engine.decode(latents, options.tile), canvas.bounds)
        return paste(decoded, canvas.pixels.cpu(), canvas.mask.cpu(), options.blend) if options.paste else decoded

    def sample_window(self, canvas: Canvas, given: Guided, keys: Keys) -> Tensor:
        """Generate the latents (B, C, T, h, w) of one window; those of known frames are encoded."""
        engine, options, vae, path = self.engine, self.options, self.engine.vae, self.engine.objective.path
        frames, height, width = canvas.pixels.shape[2:]
        size = (frames, height, width)
        shape = engine.latent_shape(size)
        on_device = canvas._replace(pixels=canvas.pixels.to(engine.device), mask=canvas.mask.to(engine.device))
        latent_mask, boundary_mask = latent_masks(on_device.mask, vae, engine.model.patch_size)
        noise = engine.draw(keys, 0, shape) if self.noise is None else self.noise.to(engine.device)
        guidance = engine.guidance(options)
        context = engine.draw(keys, _NOISED_CONTEXT, shape) if guidance.history != 1 else None
        output = SteeredDenoiser(
            partial(engine.denoiser, noised_context=context),
            engine.with_clip_facts(given, size, options.fps),
            guidance,
            self.on_step,
        )
        if engine.uses_diffusers(options.solver):
            return self._run_diffusers(output, noise)
        levels, base = engine.schedule(options, shape, canvas.strength), None
        if canvas.strength < 1:
            base = vae.encode(on_device.pixels.to(vae.dtype)).float()
        levels = make_schedule(
            levels.to(engine.device),
            latent_mask,
            options.arrangement,
            chunk_size=options.chunk_size,
            stagger=options.stagger,
        )
        known = encode_known(on_device.pixels, on_device.mask, latent_mask, vae).float()
        predict = engine.predictor(output)
        if boundary_mask.any():
            decode = partial(engine.decode, tile=options.tile)
            predict = pixel_guided(predict, on_device, boundary_mask, vae=vae, path=path, decode=decode)
        return solve(
            initial_schedule(known, noise, latent_mask=latent_mask, levels=levels, path=path, base=base),
            predict,
            path,
            options.solver or engine.default_solver,
            draw=lambda step: engine.draw(keys, step + 1, shape),
            end_step=engine.step_ends(output),
            progress=partial(engine.progress, show=options.progress),
        )

    def _run_diffusers(self, output: SteeredDenoiser, x: Tensor) -> Tensor:
        """Sample latents from noise x with a diffusers scheduler, which has one level for all frames."""
        engine, scheduler = self.engine, self.engine.scheduler
        scheduler.set_timesteps(self.options.num_inference_steps, device=engine.device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
        steps = len(scheduler.timesteps)
        for step, t in enumerate(engine.progress(scheduler.timesteps, self.options.progress)):
            levels = engine.objective.path.levels(t).expand(1, x.shape[2])
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            predicted = output(scaled, levels)
            if not learned:
                predicted = predicted[:, : x.shape[1]]
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
            x, stop = output.end_step(step, steps, t, x)
            if stop:
                break
        return x

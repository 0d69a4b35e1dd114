"""STDiTPipeline: labels in, clips out."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stdit.keys import keyed_normal
from stdit.model.stdit import STDiT
from stdit.precision import Precision, autocast
from stdit.sampling.guidance import guided
from stdit.sampling.plan import generate
from stdit.sampling.scheduler import STDiTScheduler, check_compatible
from stdit.sampling.solvers import solve
from stdit.sources import check_reachable, locate
from stdit.vae import as_video_vae

Labels = Sequence[int | str] | int | str | Tensor | None


class STDiTPipeline(DiffusionPipeline):
    """Sample clips from a trained STDiT. Saved and loaded like any diffusers pipeline.

    num_frames, height, width, fps: what the model was trained on, used where a call names no size.
    objective: what the transformer's output means, whatever scheduler is plugged in.
    """

    def __init__(
        self,
        transformer: STDiT,
        vae: torch.nn.Module,
        scheduler,
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        fps: float = 8.0,
        objective: str = "flow",
        vae_fingerprint: str | None = None,
    ):
        super().__init__()
        video_vae = as_video_vae(vae)
        if transformer.in_channels != video_vae.channels:
            raise ValueError(
                f"The model takes latents of {transformer.in_channels} channels, VAE {video_vae.name!r} makes "
                f"{video_vae.channels}; load the VAE it was trained with."
            )
        if not isinstance(scheduler, STDiTScheduler):
            check_compatible(scheduler, objective)
        # The component is what diffusers can save; the contract around its classes is put on here.
        component = getattr(vae, "vae", vae)
        self.register_modules(transformer=transformer, vae=component, scheduler=scheduler)
        self.register_to_config(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            objective=objective,
            vae_fingerprint=vae_fingerprint,
        )
        self.video_vae = video_vae.requires_grad_(False).eval()
        if vae_fingerprint and self.video_vae.fingerprint() != vae_fingerprint:
            raise ValueError(
                f"VAE {video_vae.name!r} has other weights than the one this model was trained with "
                f"({self.video_vae.fingerprint()} instead of {vae_fingerprint}); load that one."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "STDiTPipeline":
        """Load a folder written by training, or a hub id; ValueError in one line if it holds no model."""
        source, options = locate(str(pretrained_model_name_or_path), "model")
        folder = Path(source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{source!r} holds no model (no model_index.json); give a folder that tools/train.py wrote, such as models/NAME."
            )
        if folder.is_dir() and not any((folder / "transformer").glob("*.safetensors*")):
            raise ValueError(f"{source!r} has no weights (transformer/*.safetensors); train again, or copy them there.")
        try:
            check_reachable(source, "model_index.json", options)
            return super().from_pretrained(source, use_safetensors=True, **options, **kwargs)
        except OSError as error:
            raise ValueError(f"{source!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error

    def labels(self, given: Labels, count: int | None = None) -> Tensor | None:
        """Numbers or names -> (B,) labels; None for an unconditional model. ValueError if a label is unknown."""
        classes, names = self.transformer.num_classes, self.transformer.config.class_names
        if given is None:
            return torch.full((count or 1,), classes) if classes else None
        if not classes:
            raise ValueError(f"class_labels={given!r} but the model is unconditional; leave class_labels out.")
        values = (
            given.tolist() if isinstance(given, Tensor) else [given] if isinstance(given, int | str) else list(given)
        )
        return torch.tensor([_label(value, classes, names) for value in values])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | str = 30,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        num_videos: int | None = None,
        solver: str | None = None,
        batch_size: int = 32,
        precision: Precision = "auto",
        progress: bool = True,
        guidance_channels: int | None = None,
    ) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1], one a label (`num_videos` for an unconditional model).

        Clip i depends on (seed, i) alone, not on its neighbours. Any frame count and size that VAE and patch hold.
        A DDPM model also takes num_inference_steps="ddim50". guidance_channels: guide only the first so many (DiT: 3).
        """
        labels = self.labels(class_labels, num_videos)
        count = len(labels) if labels is not None else num_videos or 1
        if isinstance(num_inference_steps, int) and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps} makes no picture; use 1 or more.")
        if guidance_channels is not None and not 1 <= guidance_channels <= self.video_vae.channels:
            raise ValueError(
                f"guidance_channels={guidance_channels} is outside the latents' 1 to {self.video_vae.channels} channels."
            )
        size = (num_frames or self.config.num_frames, height or self.config.height, width or self.config.width)
        shape = self.video_vae.latent_shape(*size, self.transformer.patch_size)
        self.set_progress_bar_config(disable=not progress, leave=False)
        clips = []
        for first in range(0, count, batch_size):
            keys = [(seed, i) for i in range(first, min(first + batch_size, count))]
            part = None if labels is None else labels[first : first + batch_size].to(self.device)
            with autocast(precision, self.device):
                guidance = (guidance_scale, guidance_interval, guidance_channels)
                latents = self._sample(keys, part, shape, num_inference_steps, guidance, solver)
            clips.append(self.decode(latents))
        return torch.cat(clips)

    def _sample(self, keys, labels, shape, steps, guidance, solver) -> Tensor:
        channels = self.video_vae.channels

        def draw(step: int) -> Tensor:
            return keyed_normal("noise", [(*key, step) for key in keys], (channels, *shape)).to(self.device)

        own = self.scheduler if isinstance(self.scheduler, STDiTScheduler) else STDiTScheduler(self.config.objective)
        ours = own is self.scheduler or solver is not None  # a solver asked for by name is one of ours
        if not ours and not isinstance(steps, int):
            raise ValueError(
                f"num_inference_steps={steps!r} is for stdit's own solvers, this model brings {type(self.scheduler).__name__}; "
                "use a number, or add solver='ddim' (--solver ddim)."
            )
        objective = own.objective
        output = guided(self.transformer, objective, labels, self.transformer.num_classes, *guidance)
        if not ours:
            return self._sample_diffusers(output, objective, draw(0), steps)
        schedule = objective.schedule(steps, shape[0] * shape[1] * shape[2])
        return solve(
            generate(draw(0), schedule),
            lambda x, levels: objective.estimate(output(x, levels), x, levels),
            objective.path,
            solver or own.solver,
            lambda step: draw(step + 1),
            self.progress_bar,
        )

    def _sample_diffusers(self, output: Callable, objective, x: Tensor, steps: int) -> Tensor:
        """The same with a diffusers scheduler: one level for all frames."""
        self.scheduler.set_timesteps(steps, device=self.device)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        for t in self.progress_bar(self.scheduler.timesteps):
            levels = objective.path.levels(t).expand(1, x.shape[2])
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            predicted = output(scaled, levels)
            if not learned:
                predicted = predicted[:, : x.shape[1]]
            x = self.scheduler.step(predicted, t, x, return_dict=False)[0]
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels on the CPU, a few clips at a time."""
        dtype = self.video_vae.dtype
        return torch.cat(
            [self.video_vae.decode(part.to(dtype)).clamp(-1, 1).float().cpu() for part in latents.split(8)]
        )


def _label(value: int | str, classes: int, names: Sequence[str] | None) -> int:
    if isinstance(value, str) and names:
        for i, name in enumerate(names):  # ImageNet's names are lists: "tench, Tinca tinca"
            if value == name or value in name.split(", "):
                return i
    if isinstance(value, str) and not value.lstrip("-").isdecimal():
        choices = f"Choose one of: {', '.join(names)}." if names else f"Use a number from 0 to {classes - 1}."
        raise ValueError(f"class label {value!r} is unknown. {choices}")
    if not 0 <= int(value) <= classes:
        raise ValueError(f"class label {value} is out of range. Use 0 to {classes - 1}, or {classes} for no label.")
    return int(value)

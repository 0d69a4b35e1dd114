"""STDiTPipeline: labels, images and clips in, clips out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stdit.hub import check_reachable, resolve_source
from stdit.legacy import renamed_section
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.precision import Precision, autocast
from stdit.prompt import Prompt
from stdit.sampling import tasks
from stdit.sampling.autoregressive import stream
from stdit.sampling.checks import check, check_window
from stdit.sampling.guidance import Guidance
from stdit.sampling.sampler import Sampler
from stdit.sampling.scheduler import STDiTScheduler, check_compatible
from stdit.sampling.tasks import Canvas
from stdit.text import TextEncoder, encode_with_null, load_text_encoder
from stdit.vae import as_video_vae
from stdit.vae.tiling import decode

Labels = Sequence[int | str] | int | str | Tensor | None
Captions = Sequence[str] | str | None


class STDiTPipeline(DiffusionPipeline):
    """Sample clips from a trained STDiT. Saved and loaded like any diffusers pipeline.

    num_frames, height, width, fps: what the model was trained on, used where a call names no size.
    objective: what the transformer's output means, whatever scheduler is plugged in. mask_strategies: how levels were drawn in
    training (`objective.mask_strategy`), so that a task can say when it is new to the model. text_encoder: what turns captions
    into tokens (`text.load_text_encoder`), loaded when it is needed.
    """

    def __init__(
        self,
        transformer: STDiT | UNet,
        vae: torch.nn.Module,
        scheduler,
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        fps: float = 8.0,
        objective: str = "flow",
        vae_fingerprint: str | None = None,
        mask_strategies: list[str] | None = None,
        text_encoder: str | None = None,
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
            mask_strategies=mask_strategies or ["shared"],
            text_encoder=text_encoder,
        )
        self.video_vae = video_vae.requires_grad_(False).eval()
        self._encoder: TextEncoder | None = None
        if vae_fingerprint and self.video_vae.fingerprint() != vae_fingerprint:
            raise ValueError(
                f"VAE {video_vae.name!r} has other weights than the one this model was trained with "
                f"({self.video_vae.fingerprint()} instead of {vae_fingerprint}); load that one."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "STDiTPipeline":
        """Load a folder written by training, or a hub id; ValueError in one line if it holds no model."""
        source, options = resolve_source(str(pretrained_model_name_or_path), "model")
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

    @classmethod
    def load_config(cls, *args, **kwargs):
        """As diffusers', for a model_index.json of version 0.1.0 too."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, tuple):
            return (renamed_section("pipeline", config[0]), *config[1:])
        return renamed_section("pipeline", config)

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

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder of a model that is told captions."""
        if self._encoder is None:
            if self.config.text_encoder is None:
                raise ValueError(
                    "this model is told captions and names no text encoder; build the pipeline with text_encoder=FOLDER of the "
                    "one it was trained with."
                )
            self._encoder = load_text_encoder(self.config.text_encoder, self.device)
        channels = self.transformer.config.caption_channels
        if self._encoder.channels != channels:
            raise ValueError(
                f"text encoder {self._encoder.name!r} gives tokens of {self._encoder.channels} channels, the model takes "
                f"{channels}; use the one it was trained with."
            )
        return self._encoder

    def prompt(self, class_labels: Labels, captions: Captions, count: int) -> Prompt:
        """What `count` clips are told; one label or caption serves all. ValueError for what the model is not told."""
        labels = self._labels_for(class_labels, count)
        null_labels = None if labels is None else torch.full_like(labels, self.transformer.num_classes)
        if self.transformer.config.caption_channels is None:
            if captions is not None:
                raise ValueError(f"captions={captions!r} but the model was trained without captions; leave them out.")
            return Prompt(labels, null=Prompt(null_labels))
        texts = [captions or ""] if captions is None or isinstance(captions, str) else list(captions)
        if len(texts) not in (1, count):
            raise ValueError(f"{len(texts)} captions for {count} clips; give one a clip, or one for all.")
        said, unsaid = encode_with_null(self.encoder, texts if len(texts) == count else texts * count)
        return Prompt(labels, *said, null=Prompt(null_labels, *unsaid))

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
        captions: Captions = None,
        **options,
    ) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1], one a label or caption (`num_videos` where neither is given).

        Clip i depends on (seed, i) alone, not on its neighbours. Any frame count and size that VAE and patch hold, all
        frames at once unless `window` says otherwise. Options: those of `fill`.
        """
        said = 1 if captions is None or isinstance(captions, str) else len(captions)
        labels = self.labels(class_labels, num_videos or said)
        count = len(labels) if labels is not None else num_videos or said
        count = max(count, said)
        size = (num_frames or self.config.num_frames, height or self.config.height, width or self.config.width)
        self.video_vae.latent_shape(*size, self.transformer.patch_size)
        options = {
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "window": size[0],
            "guidance_interval": guidance_interval, "seed": seed, "solver": solver, "captions": captions, **options,
        }  # fmt: skip
        return self.fill(tasks.blank(count, *size), labels, **options)

    def animate(self, image: Tensor, num_frames: int | None = None, class_labels: Labels = None, **options) -> Tensor:
        """An image (B, 3, H, W) in [-1, 1] becomes the first of `num_frames`. Options: those of `fill`."""
        return self.fill(tasks.animate(image, num_frames or self.config.num_frames), class_labels, **options)

    def extend(self, clip: Tensor, after: int = 0, before: int = 0, class_labels: Labels = None, **options) -> Tensor:
        """A clip with `after` new frames behind it and `before` new frames in front. Options: those of `fill`.

        Beyond the length the model was trained at, window by window, each seeing up to `overlap` frames before it.
        """
        return self.fill(tasks.extend(clip, after, before, self.video_vae), class_labels, **options)

    @torch.no_grad()
    def stream(
        self,
        clip: Tensor,
        after: int,
        class_labels: Labels = None,
        captions: Captions = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        seed: int = 0,
        solver: str | None = None,
        fps: float | None = None,
        precision: Precision = "auto",
    ) -> Iterator[Tensor]:
        """`after` new frames behind a clip by a causal model, group by group as they are made: (B, 3, f, H, W).

        Time and memory for a new frame stay constant however long it runs: keys and values of finished frames are kept
        for the model's window (and its sink), pixels are decoded as a stream.
        """
        if not self.transformer.config.causal:
            raise ValueError("this model is not causal; use extend, or train with model.causal=true.")
        step = self.video_vae.temporal_granularity or self.video_vae.stride[0]
        # The canvas of one group stands for all: a stream holds no whole clip.
        canvas = tasks.extend(clip, after if after % step else min(after, step), 0, self.video_vae)
        of = self.prompt(class_labels, captions, len(clip)).each(lambda x: x.to(self.device))
        sampler = Sampler(self, num_inference_steps, Guidance(guidance_scale), solver, fps=fps)
        total = clip.shape[2] + after
        check(sampler, canvas, total, seed)
        self.set_progress_bar_config(disable=True)
        keys = [(seed, i) for i in range(len(clip))]
        frames = stream(sampler, clip, (total, *clip.shape[3:]), of, keys)
        while True:  # a generator must not hold autocast open between its parts
            with autocast(precision, self.device):
                part = next(frames, None)
            if part is None:
                return
            yield part

    def connect(self, first: Tensor, last: Tensor, frames: int, class_labels: Labels = None, **options) -> Tensor:
        """`first`, `frames` new frames, `last`: clips, or images (B, 3, H, W). Options: those of `fill`."""
        return self.fill(tasks.connect(first, last, frames, self.video_vae), class_labels, **options)

    def loop(self, clip: Tensor, frames: int, class_labels: Labels = None, **options) -> Tensor:
        """A clip and `frames` new frames whose last flows into the clip's first. Options: those of `fill`."""
        return self.fill(tasks.loop(clip, frames, self.video_vae), class_labels, **options)

    def interpolate(
        self,
        clip: Tensor,
        factor: int = 2,
        class_labels: Labels = None,
        strength: float = 0.4,
        fps: float | None = None,
        **options,
    ) -> Tensor:
        """`factor` times as many frames a second: (F - 1) * factor + 1 frames. Options: those of `fill`.

        New frames begin as the blend of their neighbours at level `strength`; more for motion that a blend misses. fps: the
        clip's own rate (null: as trained); a model that is told rates is told `factor` times that.
        """
        canvas = tasks.interpolate(clip, factor, self.video_vae, strength)
        return self.fill(canvas, class_labels, fps=(fps or self.config.fps) * factor, **options)

    def inpaint(self, clip: Tensor, mask: Tensor, class_labels: Labels = None, **options) -> Tensor:
        """Make anew where mask (F, H, W), bool, is true. Options: those of `fill`."""
        return self.fill(tasks.inpaint(clip, mask), class_labels, **options)

    def edit(self, clip: Tensor, strength: float = 0.6, class_labels: Labels = None, **options) -> Tensor:
        """Noise a clip to level `strength` and denoise it under another label. Options: those of `fill`."""
        return self.fill(tasks.edit(clip, strength), class_labels, **options)

    @torch.no_grad()
    def fill(
        self,
        canvas: Canvas,
        class_labels: Labels = None,
        captions: Captions = None,
        num_inference_steps: int | str = 30,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        history_guidance: float = 1.0,
        seed: int = 0,
        solver: str | None = None,
        arrangement: str = "together",
        every: int = 1,
        window: int | None = None,
        overlap: int | None = None,
        blend: int = 0,
        paste: bool = True,
        tile: int | None = None,
        fps: float | None = None,
        batch_size: int = 32,
        precision: Precision = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Make what of a canvas is to be made -> (B, 3, F, H, W) in [-1, 1]; known pixels come back as they were.

        captions: for a model that is told captions, one a clip or one for all; none is the empty one.
        A DDPM model also takes num_inference_steps="ddim50". guidance_channels: guide only the first so many (DiT: 3).
        history_guidance: guide toward the known frames (above 1). arrangement: together, autoregressive by chunks of
        `every` latent frames, or pyramid, neighbours `every` steps apart. window: frames looked at at a time (null: as
        trained); overlap: of these, known frames at most. blend: known pixels this near to made ones fade into them.
        paste: false leaves known pixels as the VAE decodes them. tile: decode in tiles of so many latents,
        for large frames in bounded memory. fps: told to a model that is conditioned on it (null: as trained).
        """
        prompt = self.prompt(class_labels, captions, len(canvas.pixels))
        canvas = tasks.pad_to_groups(canvas, self.video_vae)
        sampler = Sampler(
            self, num_inference_steps, Guidance(guidance_scale, guidance_interval, guidance_channels, history_guidance),
            solver, arrangement, every, blend if paste else None, tile, fps,
        )  # fmt: skip
        length, overlap = self._window(canvas, window, overlap)
        check(sampler, canvas, length, seed)
        self.set_progress_bar_config(disable=not progress, leave=False)
        filled = []
        for first in range(0, len(canvas.pixels), batch_size):
            between = None if canvas.between is None else canvas.between[:, first : first + batch_size]
            part = canvas._replace(pixels=canvas.pixels[first : first + batch_size], between=between)
            keys = [(seed, first + i) for i in range(len(part.pixels))]
            with autocast(precision, self.device):
                of = prompt.each(lambda x, first=first: x[first : first + batch_size].to(self.device))
                filled.append(sampler.fill(part, of, keys, length, overlap))
        return torch.cat(filled)[:, :, canvas.answer]

    def _labels_for(self, given: Labels, count: int) -> Tensor | None:
        labels = given if isinstance(given, Tensor) else self.labels(given, count)
        if labels is not None and len(labels) == 1 and count > 1:
            labels = labels.expand(count)
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} class_labels for {count} clips; give one a clip, or one for all.")
        return labels

    def _window(self, canvas: Canvas, window: int | None, overlap: int | None) -> tuple[int, int]:
        """Frames looked at at a time, and how many of them may be known ones before those to be made."""
        frames, stride = canvas.pixels.shape[2], self.video_vae.stride[0]
        if window is not None:
            check_window(window, canvas, self.video_vae)
        length = max(self.config.num_frames, 1 + 2 * stride) if window is None else window
        if overlap is not None and not 1 <= overlap <= length - stride:
            raise ValueError(
                f"overlap={overlap} leaves nothing to be made in a window of {length} frames; use 1 to {length - stride}."
            )
        if frames < length:  # all at once; what does not fill a group is made and cut
            length = next(n for n in range(frames, length + 1) if tasks.fits(self.video_vae, n))
        return length, length // 2 // stride * stride + 1 if overlap is None else overlap

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Latents to pixels on the CPU, a few clips at a time; `tile`: in tiles of so many latents (`vae.tiling`)."""
        return decode(self.video_vae, latents, tile)


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

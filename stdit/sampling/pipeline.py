"""STDiTPipeline, which samples clips from labels, captions, images and clips."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from stdit.conditions import Guided, Label
from stdit.conditions.label import label_number  # noqa: F401 (under its former name)
from stdit.conditions.values import map_tensors, rows
from stdit.hashes import check_weights, write_weights_manifest
from stdit.hub import check_reachable, resolve_source
from stdit.legacy import aliases, renamed_section
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.precision import autocast
from stdit.sampling import tasks
from stdit.sampling.autoregressive import AutoregressiveSampler, Rollout
from stdit.sampling.canvas import Canvas
from stdit.sampling.checks import (
    check,
    check_conditions,
    check_streamed,
    check_world,
    not_streamed,
    streams,
    warn_of_conditions,
)
from stdit.sampling.engine import Engine, TrainedOn
from stdit.sampling.groups import fits, pad_to_groups
from stdit.sampling.inputs import NEGATIVE, Captions, Labels, count_clips, pair_conditions, refusal, split
from stdit.sampling.model_folder import check_folder
from stdit.sampling.options import SamplingOptions
from stdit.sampling.scheduler import STDiTScheduler, check_compatible
from stdit.sampling.windowed import WindowedSampler
from stdit.sampling.windows import window_size
from stdit.sampling.world import World
from stdit.text import Encoded, TextEncoder, load_text_encoder, warn_of_length
from stdit.vae import as_video_vae
from stdit.vae.tiling import decode


class STDiTPipeline(DiffusionPipeline):
    """Sample clips from a trained STDiT. Saved and loaded like any diffusers pipeline.

    num_frames, height, width, fps: those of training, used where a call gives none. objective: what the transformer's
    output means, whatever the scheduler. mask_strategies: how known frames were chosen in training
    (`objective.mask_strategy`), for warnings about tasks that need others. text_encoder: name of the encoder of
    captions (`text.load_text_encoder`). guide: a weaker model of the same kind, which guidance leads away from.
    history_noise: the default of that option.
    """

    model_cpu_offload_seq = "guide->transformer->vae"
    _optional_components = ["guide"]
    _trained_scheduler: STDiTScheduler | None = None  # which knows the noise levels of training, whatever replaces it

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; ValueError for a scheduler that means another parameterisation than the model's."""
        if name == "scheduler":
            if isinstance(value, STDiTScheduler):
                self._trained_scheduler = value
            elif (objective := self.config.get("objective")) is not None:
                check_compatible(value, objective, self._trained_scheduler)
        super().__setattr__(name, value)

    def __init__(
        self,
        transformer: STDiT | UNet,
        vae: torch.nn.Module,
        scheduler: SchedulerMixin,
        num_frames: int = 17,
        height: int = 64,
        width: int = 64,
        fps: float = 8.0,
        objective: str = "flow",
        vae_fingerprint: str | None = None,
        mask_strategies: list[str] | None = None,
        text_encoder: str | None = None,
        guide: STDiT | UNet | None = None,
        history_noise: float = 0.0,
    ):
        super().__init__()
        video_vae = as_video_vae(vae)
        if transformer.in_channels != video_vae.channels:
            raise ValueError(
                f"The model takes latents of {transformer.in_channels} channels, but VAE {video_vae.name!r} makes "
                f"{video_vae.channels}; load the VAE it was trained with."
            )
        if not isinstance(scheduler, STDiTScheduler):
            check_compatible(scheduler, objective)
        if guide is not None and _interface(guide) != _interface(transformer):
            raise ValueError(
                "The guide takes other inputs than the model, so guidance cannot lead away from it; give an earlier state of "
                "the same run, or leave it out."
            )
        # The component is the bare model, which diffusers can save; `video_vae` wraps it in the interface of VideoVAE.
        component = getattr(vae, "vae", vae)
        self.register_modules(transformer=transformer, vae=component, scheduler=scheduler, guide=guide)
        self.register_to_config(
            num_frames=num_frames,
            height=height,
            width=width,
            fps=fps,
            objective=objective,
            vae_fingerprint=vae_fingerprint,
            mask_strategies=mask_strategies or ["shared"],
            text_encoder=text_encoder,
            history_noise=history_noise,
        )
        self.video_vae = video_vae.requires_grad_(False).eval()
        self._encoder: TextEncoder | None = None
        if vae_fingerprint and not self.video_vae.has_fingerprint(vae_fingerprint):
            raise ValueError(
                f"VAE {video_vae.name!r} has other weights than the one this model was trained with "
                f"({self.video_vae.fingerprint()} instead of {vae_fingerprint}); load that one."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder written by training, or a hub id; ValueError in one line if it holds no model."""
        source, options = resolve_source(str(pretrained_model_name_or_path), "model")
        try:
            check_reachable(source, "model_index.json", options)
            if not Path(source).is_dir():
                source, options = cls.download(source, use_safetensors=True, **options), {}
            check_folder(Path(source))
            check_weights(Path(source))
            # The VAE is loaded in float32, where its fingerprint can be compared, and converted afterwards.
            dtypes = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or torch.float32
            dtypes = dict(dtypes) if isinstance(dtypes, dict) else {"default": dtypes}
            vae_dtype = dtypes.get("vae", dtypes.get("default", torch.float32))
            dtypes["vae"] = torch.float32
            pipe = super().from_pretrained(source, use_safetensors=True, dtype=dtypes, **options, **kwargs)
            if "vae" not in kwargs:
                torch.nn.Module.to(pipe.vae, vae_dtype)  # diffusers' own `to` warns of every conversion
            return pipe
        except (OSError, TypeError, AttributeError, KeyError) as error:  # the latter of a scheduler's config
            raise ValueError(f"{source!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with MANIFEST.json: the hashes of the weights, which loading compares."""
        if self.config.vae_fingerprint and self.video_vae.dtype != torch.float32:  # the saved weights are rounded ones
            self.register_to_config(vae_fingerprint=self.video_vae.fingerprint())
        super().save_pretrained(save_directory, *args, **kwargs)
        write_weights_manifest(Path(save_directory))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load the config as diffusers does, with old names in a model_index.json of version 0.1.0 converted."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, tuple):
            return (renamed_section("pipeline", config[0]), *config[1:])
        return renamed_section("pipeline", config)

    def labels(self, given: Labels, count: int | None = None) -> Tensor | None:
        """Convert class numbers or names to labels (B,); None for an unconditional model. ValueError for unknown ones.

        count: the number of null labels to return if no label is given.
        """
        label = self.transformer.conditioners.get("label")
        if given is None:
            return None if label is None else label.null(count or 1)[:, 0]
        if not isinstance(label, Label):
            raise ValueError(refusal("class_labels", given))
        values = given.tolist() if isinstance(given, Tensor) else given
        return torch.tensor([label.number(one) for one in ([values] if isinstance(values, int | str) else values)])

    @property
    def encoder(self) -> TextEncoder:
        """The text encoder of a model with captions, loaded when it is needed."""
        if self._encoder is None:
            if self.config.text_encoder is None:
                raise ValueError(
                    "this model needs captions and its pipeline names no text encoder; build the pipeline with "
                    "text_encoder=FOLDER of the one it was trained with."
                )
            self._encoder = load_text_encoder(self.config.text_encoder, self._execution_device)
        channels = self.transformer.config.caption_channels
        if self._encoder.channels != channels:
            raise ValueError(
                f"text encoder {self._encoder.name!r} gives tokens of {self._encoder.channels} channels, the model takes "
                f"{channels}; use the one it was trained with."
            )
        return self._encoder

    def conditions(self, count: int, **given: Any) -> Guided:
        """The conditions of `count` clips, and the null conditions that guidance leads away from.

        given: class_labels, captions, or the keyword of another condition; one value per clip, or one for all. With
        `negative_` before the keyword: the value in place of the null. ValueError for a condition that the model does
        not have.
        """
        return pair_conditions(self.transformer.conditioners, given, count, encode=lambda: self._encode)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        warn_of_length(self.encoder, list(dict.fromkeys(texts)))
        return self.encoder.encode(texts)

    @property
    def _dtypes(self) -> set[torch.dtype]:
        return {self.transformer.dtype, self.video_vae.dtype}

    @property
    def engine(self) -> Engine:
        """The parts of this pipeline that samplers need."""
        scheduler, config = self.scheduler, self.config
        ours = self._trained_scheduler or STDiTScheduler(config.objective)
        trained_on = TrainedOn(
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            mask_strategies=tuple(config.mask_strategies),
        )
        return Engine(
            model=self.transformer,
            vae=self.video_vae,
            objective=ours.objective,
            scheduler=scheduler,
            trained_on=trained_on,
            device=self._execution_device,
            guide=self.guide,
            history_noise=config.history_noise,
        )

    def __call__(
        self,
        class_labels: Labels = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        *,
        captions: Captions = None,
        negative_captions: Captions = None,
        negative_class_labels: Labels = None,
        num_videos: int | None = None,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Tensor:
        """Sample clips (B, 3, F, H, W) in [-1, 1], one per label or caption, or `num_videos` of one or of none.

        Clip i depends on (seed, i) alone, not on the other clips. Frame count and size may be any that fit the VAE and
        the patch. All frames are sampled at once unless `window` is given. Options: those of `fill`.
        """
        positional = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        choices |= {name: value for name, value in positional.items() if value is not None}
        choices |= {"negative_captions": negative_captions, "negative_class_labels": negative_class_labels}
        options, given = split(options, choices)
        size = (num_frames or self.config.num_frames, height or self.config.height, width or self.config.width)
        self.video_vae.latent_shape(*size, self.transformer.patch_size)
        if options.window is None:
            options = dataclasses.replace(options, window=size[0])
        count = count_clips(
            self.transformer.conditioners, given, class_labels=class_labels, captions=captions, num_videos=num_videos
        )
        canvas = tasks.blank(count, *size)
        return self.fill(canvas, class_labels, captions, options=options, **given)

    def animate(
        self, image: Tensor, num_frames: int | None = None, class_labels: Labels = None, **choices: Any
    ) -> Tensor:
        """Generate `num_frames` frames, the first of which is an image (B, 3, H, W). Options: those of `fill`."""
        return self.fill(tasks.animate(image, num_frames or self.config.num_frames), class_labels, **choices)

    def extend(
        self, clip: Tensor, after: int = 0, before: int = 0, class_labels: Labels = None, **choices: Any
    ) -> Tensor:
        """Extend a clip by `before` frames at its start and `after` frames at its end. Options: those of `fill`.

        Beyond the length of training, frames are generated window by window, each with up to `overlap` known frames.
        """
        return self.fill(tasks.extend(clip, after, before, self.video_vae), class_labels, **choices)

    def stream(
        self,
        clip: Tensor,
        after: int,
        class_labels: Labels = None,
        captions: Captions = None,
        *,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Iterator[Tensor]:
        """Continue a clip by `after` frames with a causal model; yields groups (B, 3, f, H, W) as they are generated.

        Time and memory per new frame stay constant however long it runs: the cache holds the model's window (and its
        sink), and pixels are decoded as a stream. Options: those of `fill`, without windows, blend and paste.
        """
        options, given = split(options, choices)
        asked = options.guider
        if not self.transformer.config.causal:
            raise ValueError("this model is not causal; use extend, or train with model.causal=true.")
        check_streamed(options)
        step = self.video_vae.temporal_granularity or self.video_vae.stride[0]
        # The canvas of one group is checked in place of the whole one, which may not fit into memory.
        canvas = tasks.extend(clip, after if after % step else min(after, step), 0, self.video_vae)
        engine, total = self.engine, clip.shape[2] + after
        with torch.no_grad():
            found = self.conditions(len(clip), class_labels=class_labels, captions=captions, **given)
        warn_of_conditions(
            canvas,
            self.engine.guidance(options).scale,
            self.transformer.conditioners,
            {**given, "class_labels": class_labels, "captions": captions},
            guider=asked,
        )
        check(engine, canvas, options, frames=total)
        check_conditions(self.transformer.conditioners, found.conditions, total, self.video_vae.stride[0])
        sampler = AutoregressiveSampler(engine, dataclasses.replace(options, progress=False))
        keys = [(options.seed, i) for i in range(len(clip))]
        found = found.change(partial(map_tensors, change=lambda x: x.to(engine.device)))
        parts = sampler.stream(clip, (total, *clip.shape[3:]), found, keys)
        return self._one_by_one(parts, options)

    def world(
        self,
        clip: Tensor | None = None,
        class_labels: Labels = None,
        captions: Captions = None,
        *,
        actions: Any = None,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> World:
        """A world that goes on as one acts: `world.step(action)` returns the frames that follow.

        clip: how it begins, (B, 3, F, H, W), an image (B, 3, H, W), or None: its first step draws a frame. actions: those of
        the clip, one for every frame or for its last ones. Options: those of `stream`. ValueError for a model that is not
        causal, or takes no actions.
        """
        options, given = split(options, choices)
        config, engine = self.config, self.engine
        condition = check_world(engine, options)
        known = torch.zeros(1, 3, 0, config.height, config.width)
        if clip is not None:
            known = clip[:, :, None] if clip.ndim == 4 else clip
            if known.ndim != 5 or known.shape[2]:  # one without frames has a size
                tasks.check_clip(known, "clip")
        count, size = len(known), (known.shape[3], known.shape[4])
        engine.latent_shape((max(1, known.shape[2]), *size))
        with torch.no_grad():
            found = self.conditions(count, class_labels=class_labels, captions=captions, **given)
        base = engine.with_clip_facts(found, (config.num_frames, *size), options.fps)
        rollout = Rollout(engine, options, size, [(options.seed, i) for i in range(count)])
        world = World(rollout, condition, base, precision=options.precision)
        if known.shape[2]:
            world.begin(known, actions)
        return world

    def can_stream(self, clip: Tensor, options: SamplingOptions | None = None) -> bool:
        """Whether `stream` gives the same result as `extend` for new frames after this clip."""
        options = options or SamplingOptions()
        plain = not not_streamed(options)
        return bool(self.transformer.config.causal) and plain and fits(self.video_vae, clip.shape[2])

    def connect(self, first: Tensor, last: Tensor, frames: int, class_labels: Labels = None, **choices: Any) -> Tensor:
        """Connect two clips, or images (B, 3, H, W), by `frames` new frames. Options: those of `fill`."""
        return self.fill(tasks.connect(first, last, frames, self.video_vae), class_labels, **choices)

    def loop(self, clip: Tensor, frames: int, class_labels: Labels = None, **choices: Any) -> Tensor:
        """Close a clip to a loop by `frames` new frames that lead back to its start. Options: those of `fill`."""
        return self.fill(tasks.loop(clip, frames, self.video_vae), class_labels, **choices)

    def interpolate(
        self,
        clip: Tensor,
        factor: int = 2,
        class_labels: Labels = None,
        strength: float = 0.4,
        *,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Tensor:
        """Multiply the frame rate by `factor`, to (F - 1) * factor + 1 frames. Options: those of `fill`.

        New frames start as the blend of their neighbours at noise level `strength`; raise it for fast motion.
        fps: the clip's rate (None: as trained); a model conditioned on rates gets `factor` times that.
        """
        options, given = split(options, choices)
        options = dataclasses.replace(options, fps=(options.fps or self.config.fps) * factor)
        canvas = tasks.interpolate(clip, factor, self.video_vae, strength)
        return self.fill(canvas, class_labels, options=options, **given)

    def inpaint(self, clip: Tensor, mask: Tensor, class_labels: Labels = None, **choices: Any) -> Tensor:
        """Regenerate the pixels where mask (F, H, W), bool, is true. Options: those of `fill`."""
        return self.fill(tasks.inpaint(clip, mask), class_labels, **choices)

    def edit(self, clip: Tensor, strength: float = 0.6, class_labels: Labels = None, **choices: Any) -> Tensor:
        """Noise a clip to level `strength` and denoise it under another label. Options: those of `fill`."""
        return self.fill(tasks.edit(clip, strength), class_labels, **choices)

    def fill(
        self,
        canvas: Canvas,
        class_labels: Labels = None,
        captions: Captions = None,
        *,
        negative_captions: Captions = None,
        negative_class_labels: Labels = None,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Tensor:
        """Generate the pixels that a canvas's mask marks -> (B, 3, F, H, W) in [-1, 1]; known pixels are unchanged.

        class_labels: numbers or names. captions: texts. Both have one value per clip, or one for all; None stands for
        no label and for the empty text. Other conditions are given by their keyword. `negative_captions`,
        `negative_class_labels` and `negative_` before another keyword: what guidance leads away from, in place of no
        condition. options: a `SamplingOptions`; choices: its fields.
        """
        choices |= {"negative_captions": negative_captions, "negative_class_labels": negative_class_labels}
        options, given = split(options, choices)
        asked = options.guider
        if asked is None and any(given[key] is not None for key in given if key.startswith(NEGATIVE)):
            options = dataclasses.replace(options, guider="cfg")  # which leads away from them
        with torch.no_grad():
            found = self.conditions(len(canvas.pixels), class_labels=class_labels, captions=captions, **given)
        warn_of_conditions(
            canvas,
            self.engine.guidance(options).scale,
            self.transformer.conditioners,
            {**given, "class_labels": class_labels, "captions": captions},
            guider=asked,
        )
        canvas = pad_to_groups(canvas, self.video_vae)
        engine = self.engine
        window = window_size(
            canvas,
            self.video_vae,
            trained_frames=engine.trained_on.num_frames,
            window=options.window,
            overlap=options.overlap,
        )
        check(engine, canvas, options, frames=window.length)
        check_conditions(
            self.transformer.conditioners, found.conditions, len(canvas.output_frames), self.video_vae.stride[0]
        )
        sampler = (
            AutoregressiveSampler(engine, options)
            if streams(engine, canvas, options)
            else WindowedSampler(engine, options, window)
        )
        to_device = partial(map_tensors, change=lambda x: x.to(engine.device))
        filled = []
        for first in range(0, len(canvas.pixels), options.batch_size):
            which = slice(first, first + options.batch_size)
            part = canvas.clips(which)
            keys = [(options.seed, first + i) for i in range(len(part.pixels))]
            with torch.no_grad(), autocast(options.precision, engine.device, self._dtypes):
                batch = found.change(partial(rows, which=which)).change(to_device)
                filled.append(sampler.fill(part, batch, keys))
        return torch.cat(filled)[:, :, canvas.output]

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Decode latents to pixels on the CPU, a few clips at a time; `tile`: the side of tiles in latents."""
        return decode(self.video_vae, latents, tile)

    def _one_by_one(self, parts: Iterator[Tensor], options: SamplingOptions) -> Iterator[Tensor]:
        while True:  # not a for loop: a generator must not keep contexts open between its parts
            with torch.no_grad(), autocast(options.precision, self._execution_device, self._dtypes):
                part = next(parts, None)
            if part is None:
                return
            yield part


__getattr__ = aliases(__name__)


def _interface(model: STDiT | UNet) -> tuple:
    """What a model takes and gives, which a guide shares with its model."""
    config = model.config
    names = ("in_channels", "learn_sigma", "num_classes", "causal", "flow_map", "timestep_scale", "timestep_reversed")
    return (model.patch_size, sorted(model.conditioners), *(config.get(name) for name in names))

"""STDiTPipeline, which samples clips from labels, captions, images and clips."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from stdit.conditions import Guided, Label
from stdit.conditions.label import label_number  # noqa: F401 (under its former name)
from stdit.conditions.values import map_tensors, rows
from stdit.labels import label_values
from stdit.legacy import aliases
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.precision import Precision, autocast
from stdit.ranges import whole_number
from stdit.sampling import tasks
from stdit.sampling.autoregressive import AutoregressiveSampler
from stdit.sampling.call import Call, read_call
from stdit.sampling.callbacks import Callback
from stdit.sampling.canvas import Canvas
from stdit.sampling.checks import check, check_conditions, check_learnt_guidance, streams, warn_of_conditions
from stdit.sampling.engine import Engine, TrainedOn
from stdit.sampling.folder_methods import FolderMethods
from stdit.sampling.groups import latents_of_output, pad_to_groups
from stdit.sampling.inputs import Captions, Labels, count_clips, pair_conditions, refusal, with_guider
from stdit.sampling.lora_methods import LoraMethods
from stdit.sampling.options import SamplingOptions
from stdit.sampling.output import OutputType, as_output
from stdit.sampling.scheduler import STDiTScheduler, check_compatible
from stdit.sampling.stream_methods import StreamMethods
from stdit.sampling.task_methods import TaskMethods
from stdit.sampling.windowed import WindowedSampler
from stdit.sampling.windows import window_size
from stdit.text import Encoded, TextEncoder, load_text_encoder, warn_of_length
from stdit.vae import as_video_vae
from stdit.vae.tiling import decode, overlap_of


class STDiTPipeline(TaskMethods, StreamMethods, FolderMethods, LoraMethods, DiffusionPipeline):
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
    _tile: int | None = None

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
        rounded = (
            self.video_vae.dtype != torch.float32
        )  # as diffusers loads them; `from_pretrained` compares before that
        if vae_fingerprint and not rounded and not self.video_vae.has_fingerprint(vae_fingerprint):
            raise ValueError(
                f"VAE {video_vae.name!r} has other weights than the one this model was trained with "
                f"({self.video_vae.fingerprint()} instead of {vae_fingerprint}); load that one."
            )

    def labels(self, given: Labels, count: int | None = None) -> Tensor | None:
        """Convert class numbers or names to labels (B,); None for an unconditional model. ValueError for unknown ones.

        count: the number of null labels to return if no label is given.
        """
        label = self.transformer.conditioners.get("label")
        if given is None:
            return None if label is None else label.null(count or 1)[:, 0]
        if not isinstance(label, Label):
            raise ValueError(refusal("class_labels", given, self.transformer.conditioners))
        return torch.tensor([label.number(one) for one in label_values(given)])

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
    def _dtypes(self) -> set[torch.dtype]:  # type: ignore[override]
        return {self.transformer.dtype, self.video_vae.dtype}

    @property
    def engine(self) -> Engine:  # type: ignore[override]
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
            tile=self._tile,
            progress_bar=getattr(self, "_progress_bar_config", {}),
        )

    def enable_vae_tiling(self, tile: int = 32) -> None:
        """Decode in tiles of `tile` latents per side in calls that give no `tile`, which bounds the memory of large frames."""
        overlap_of(tile)  # which raises ValueError for one without room for neighbours
        self._tile = tile

    def disable_vae_tiling(self) -> None:
        """Decode whole frames again in calls that give no `tile`."""
        self._tile = None

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
        prompt: Captions = None,
        negative_prompt: Captions = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        num_videos_per_prompt: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        output_type: OutputType | None = None,
        return_dict: bool | None = None,
        **choices: Any,
    ) -> Any:
        """Sample clips (B, 3, F, H, W) in [-1, 1], one per label or caption, or `num_videos` of one or of none.

        Clip i depends on (seed, i) alone, not on the other clips. Frame count and size may be any that fit the VAE and
        the patch. All frames are sampled at once unless `window` is given. Options: those of `fill`.

        As diffusers' video pipelines have them: prompt, negative_prompt: `captions`, `negative_captions`; prompt_embeds,
        negative_prompt_embeds: tokens (B, L, C) of the text encoder in their place; prompt_attention_mask,
        negative_prompt_attention_mask: (B, L), which of them are no padding. num_videos_per_prompt: clips of each prompt or
        label, next to each other. generator: its initial seed is `seed`, it is not used up; of a list each is
        the seed of one clip. latents: the noise to start from, (B, C, T, h, w).
        callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step, with the tensors that
        callback_on_step_end_tensor_inputs names, and may return others. output_type: "pil", "np", "pt" or "latent" gives
        an output with `.frames`, or with return_dict=False a tuple; without both, the call gives a tensor.
        """
        positional = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        choices |= {name: value for name, value in positional.items() if value is not None}
        call = self._call(
            class_labels=class_labels, captions=captions, negative_captions=negative_captions,
            negative_class_labels=negative_class_labels, options=options, prompt=prompt, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            num_videos_per_prompt=num_videos_per_prompt, generator=generator, latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, output_type=output_type,
            return_dict=return_dict, **choices,
        )  # fmt: skip
        size = self._size(num_frames=num_frames, height=height, width=width)
        self.video_vae.latent_shape(*size, self.transformer.patch_size)
        if call.options.window is None:
            call = dataclasses.replace(call, options=dataclasses.replace(call.options, window=size[0]))
        count = count_clips(self.transformer.conditioners, call.given, num_videos=num_videos)
        return self._fill(tasks.blank(count, *size), call)

    def _size(self, **given: Any) -> tuple[int, int, int]:
        """Frames, height and width of a call: those given, otherwise those of training."""
        frames, height, width = (
            self.config[name] if value is None else whole_number(name, value, None) for name, value in given.items()
        )
        return frames, height, width

    def _call(self, **arguments: Any) -> Call:
        call = read_call(arguments, self.transformer.conditioners)
        if "guidance" in self.transformer.conditioners:
            check_learnt_guidance(call.given)
        return call

    def _fill(self, canvas: Canvas, call: Call) -> Any:
        """Fill a canvas as a call asks for it; `fill` has the arguments."""
        options, per_prompt = with_guider(call.options, call.given), call.num_videos_per_prompt
        clips = len(canvas.pixels)
        canvas = pad_to_groups(canvas.repeated(per_prompt), self.video_vae)
        engine, count = self.engine, len(canvas.pixels)
        self._guidance_scale = engine.guidance(options).scale
        window = window_size(
            canvas,
            self.video_vae,
            trained_frames=engine.trained_on.num_frames,
            window=options.window,
            overlap=options.overlap,
        )
        check(engine, canvas, options, frames=window.length)
        on_step = self._step_function(call.callback, call.callback_inputs)
        sampler: AutoregressiveSampler | WindowedSampler = (
            AutoregressiveSampler(engine, options, on_step=on_step)
            if streams(engine, canvas, options)
            else WindowedSampler(engine, options, window, on_step=on_step)
        )
        keys, noise, output = options.keys(count), None, canvas.output
        if call.latents is not None:
            noise = call.noise((count, engine.vae.channels, *sampler.latent_shape(canvas)))
        if call.output_type == "latent":
            sampler.latent_shape(canvas)
            output = latents_of_output(canvas, self.video_vae)
        with torch.no_grad():  # after the checks, since it may load a text encoder
            found = self.conditions(clips, **call.given)
        self._warn(canvas, call)
        check_conditions(
            self.transformer.conditioners, found.conditions, len(canvas.output_frames), self.video_vae.stride[0]
        )
        per_clip = partial(map_tensors, change=lambda x: x.repeat_interleave(per_prompt, 0) if len(x) == clips else x)
        to_device = partial(map_tensors, change=lambda x: x.to(engine.device))
        found = found.change(per_clip)
        filled = []
        for first in range(0, count, options.batch_size):
            which = slice(first, first + options.batch_size)
            part = dataclasses.replace(sampler, noise=None if noise is None else noise[which])
            run = part.latents if call.output_type == "latent" else part.fill
            with torch.no_grad(), autocast(options.precision, engine.device, self._dtypes):
                batch = found.change(partial(rows, which=which)).change(to_device)
                filled.append(run(canvas.clips(which), batch, keys[which]))
        self._current_timestep = None
        self.maybe_free_model_hooks()
        return as_output(torch.cat(filled)[:, :, output], call.output_type, call.return_dict)

    def _warn(self, canvas: Canvas, call: Call) -> None:
        """Warn of conditions without effect."""
        scale = self.engine.guidance(call.options).scale
        warn_of_conditions(canvas, scale, self.transformer.conditioners, call.given, guider=call.options.guider)

    def decode(self, latents: Tensor, tile: int | None = None, precision: Precision | None = None) -> Tensor:
        """Decode latents to pixels on the CPU, a few clips at a time; `tile`: the side of tiles in latents.

        precision: that of the call that gave the latents ("auto" if it named none), whose pixels these then are; None: that
        of the VAE's weights.
        """
        with nullcontext() if precision is None else autocast(precision, self._execution_device, self._dtypes):
            return decode(self.video_vae, latents, tile or self._tile)


__getattr__ = aliases(__name__)


def _interface(model: STDiT | UNet) -> tuple:
    """What a model takes and gives, which a guide shares with its model."""
    config = model.config
    names = ("in_channels", "learn_sigma", "num_classes", "causal", "flow_map", "timestep_scale", "timestep_reversed")
    return (model.patch_size, sorted(model.conditioners), *(config.get(name) for name in names))

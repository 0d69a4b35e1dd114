"""The methods of a pipeline that go on frame by frame, with a causal model: a stream, and a world that one acts in."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stdit.conditions import Guided
from stdit.conditions.values import map_tensors
from stdit.precision import autocast
from stdit.ranges import whole_number
from stdit.sampling import tasks
from stdit.sampling.autoregressive import AutoregressiveSampler, Rollout
from stdit.sampling.call import Call
from stdit.sampling.callbacks import CallbackState
from stdit.sampling.canvas import Canvas
from stdit.sampling.checks import check, check_conditions, check_streamed, check_world, not_streamed
from stdit.sampling.engine import Engine
from stdit.sampling.groups import fits
from stdit.sampling.inputs import NEGATIVE, Captions, Labels
from stdit.sampling.media import as_clips
from stdit.sampling.options import SamplingOptions
from stdit.sampling.output import as_output
from stdit.sampling.world import World
from stdit.vae import VideoVAE


class StreamMethods(CallbackState):
    """The methods of `STDiTPipeline` for causal models."""

    config: Any
    transformer: Any
    video_vae: VideoVAE
    engine: Engine
    conditions: Callable[..., Guided]
    maybe_free_model_hooks: Callable[[], None]
    _call: Callable[..., Call]
    _warn: Callable[[Canvas, Call], None]
    _dtypes: set[torch.dtype]
    _execution_device: torch.device

    def stream(
        self,
        clip: Any,
        after: int,
        class_labels: Labels = None,
        captions: Captions = None,
        *,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Iterator[Any]:
        """Continue a clip by `after` frames with a causal model; yields groups (B, 3, f, H, W) as they are generated.

        Time and memory per new frame stay constant however long it runs: the cache holds the model's window (and its
        sink), and pixels are decoded as a stream. Options: those of `fill`, without windows, blend and paste.
        """
        call = self._call(class_labels=class_labels, captions=captions, options=options, **choices)
        call.refuse("a stream", "latents", "num_videos_per_prompt")
        if call.output_type == "latent":
            raise ValueError("a stream yields pixels as they are decoded; use output_type pil, np or pt.")
        if not self.transformer.config.causal:
            raise ValueError("this model is not causal; use extend, or train with model.causal=true.")
        options, clip, after = call.options, as_clips(clip, "clip"), whole_number("after", after, None)
        check_streamed(options)
        step = self.video_vae.temporal_granularity or self.video_vae.stride[0]
        # The canvas of one group is checked in place of the whole one, which may not fit into memory.
        canvas = tasks.extend(clip, after if after % step else min(after, step), 0, self.video_vae)
        engine, total = self.engine, clip.shape[2] + after
        check(engine, canvas, options, frames=total)
        with torch.no_grad():  # after the check, since it may load a text encoder
            found = self.conditions(len(clip), **call.given)
        self._warn(canvas, call)
        check_conditions(self.transformer.conditioners, found.conditions, total, self.video_vae.stride[0])
        on_step = self._step_function(call.callback, call.callback_inputs)
        sampler = AutoregressiveSampler(engine, dataclasses.replace(options, progress=False), on_step=on_step)
        found = found.change(partial(map_tensors, change=lambda x: x.to(engine.device)))
        parts = sampler.stream(clip, (total, *clip.shape[3:]), found, options.keys(len(clip)))
        return (as_output(part, call.output_type, call.return_dict) for part in self._one_by_one(parts, options))

    def world(
        self,
        clip: Any = None,
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
        call = self._call(class_labels=class_labels, captions=captions, options=options, **choices)
        call.refuse("a world", "latents", "num_videos_per_prompt", "output_type")
        options, config, engine = call.options, self.config, self.engine
        condition = check_world(engine, options)
        if call.given.get(f"{NEGATIVE}{condition.name}") is not None:
            raise ValueError(
                f"a world takes no {NEGATIVE}{condition.name}: guidance leads away from no action; leave it out, or use stream."
            )
        known = torch.zeros(1, 3, 0, config.height, config.width)
        if isinstance(clip, Tensor) and clip.ndim == 5 and not clip.shape[2]:  # one without frames has a size
            known = clip
        elif clip is not None:
            known = as_clips(clip, "clip", "either")
        if actions is not None and not known.shape[2]:
            raise ValueError(
                "actions= are those of the clip, which has no frames; give a clip, or give an action to each step."
            )
        count, size = len(known), (known.shape[3], known.shape[4])
        engine.latent_shape((max(1, known.shape[2]), *size))
        with torch.no_grad():
            found = self.conditions(count, **call.given)
        base = engine.with_clip_facts(found, (config.num_frames, *size), options.fps)
        on_step = self._step_function(call.callback, call.callback_inputs)
        rollout = Rollout(engine, options, size, options.keys(count), on_step=on_step)
        world = World(rollout, condition, base, precision=options.precision)
        if known.shape[2]:
            world.begin(known, actions)
        return world

    def can_stream(self, clip: Any, options: SamplingOptions | None = None) -> bool:
        """Whether `stream` gives the same result as `extend` for new frames after this clip."""
        options = options or SamplingOptions()
        plain = not not_streamed(options)
        return bool(self.transformer.config.causal) and plain and fits(self.video_vae, as_clips(clip, "clip").shape[2])

    def _one_by_one(self, parts: Iterator[Tensor], options: SamplingOptions) -> Iterator[Tensor]:
        while True:  # not a for loop: a generator must not keep contexts open between its parts
            with torch.no_grad(), autocast(options.precision, self._execution_device, self._dtypes):
                part = next(parts, None)
            if part is None:
                return self.maybe_free_model_hooks()
            yield part

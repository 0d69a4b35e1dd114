"""Previews of one's own in training: what `stdit sample` would write, given as its flags (`train.previews`)."""

import argparse
import dataclasses
import io
import shlex
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any, NamedTuple

import torch

from stdit.config import Config
from stdit.data.video_write import to_uint8
from stdit.recipes import sample, sampling
from stdit.recipes.sample_tasks import check_options
from stdit.sampling.options import options_from
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.parallel import is_sharded
from stdit.training.results import Preview

# Flags of `stdit sample` without a meaning in training.
_OUT_OF_PLACE = ("--model", "--lora", "--output", "--overwrite", "--gif")


class OwnPreview(NamedTuple):
    """One entry of `train.previews`: its text, its parsed flags, its input files, and its call of the pipeline."""

    text: str
    args: argparse.Namespace
    inputs: list
    call: sampling.Call


def read_previews(config: Config, pipe: STDiTPipeline, *, quiet: bool = False) -> list[OwnPreview]:
    """Parse `train.previews`, read their files and try each with one step, before training; ValueError names a wrong entry.

    A model that is sharded cannot be tried, since one process has no whole one. quiet: without warnings.
    """
    found, trained = [], pipe.transformer.training
    pipe.transformer.eval()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        for text in config.train.previews:
            try:
                one = _read(text, config, pipe)
                if not is_sharded(pipe.transformer):
                    quick = dataclasses.replace(one.call.options, num_inference_steps=1, solver=None)
                    _sample(one._replace(call=one.call._replace(options=quick)), pipe)
            except (ValueError, OSError) as error:
                raise ValueError(f"train.previews: {text!r}: {error}") from error
            found.append(one)
    pipe.transformer.train(trained)
    return found


def _read(text: str, config: Config, pipe: STDiTPipeline) -> OwnPreview:
    words = shlex.split(text)
    given = {word.partition("=")[0] for word in words}
    for flag in _OUT_OF_PLACE:
        if flag in given:
            raise ValueError(f"{flag} has no place in a preview, which shows the model in training; leave it out.")
    train = config.train
    # As the previews of the data: always from the same noise, with fewer steps than the samples at the end.
    defaults = {"--seed": config.seed, "--steps": max(8, train.sample_steps // 2), "--guidance": train.guidance}
    words += [str(part) for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args = sample.parse(words)
    except SystemExit as error:
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(reason or "these are no flags of stdit sample; see stdit sample --help") from error
    options = options_from(args, precision=train.precision, progress=False)
    check_options(args)
    inputs = sampling.read_inputs(args, pipe)
    call = sampling.build_call(args, pipe, options)
    for keyword, flag in (("captions", "--caption"), ("negative_captions", "--negative-caption")):
        if getattr(args, flag[2:].replace("-", "_")) and "caption" not in pipe.transformer.conditioners:
            raise ValueError(f"{flag} is for a model with {keyword.removeprefix('negative_')}; leave it out.")
    args.num_clips = call.num_clips
    return OwnPreview(text, args, inputs, call)


def sample_previews(previews: Sequence[OwnPreview], pipe: STDiTPipeline) -> list[list[Preview]]:
    """Sample entries: one clip each, or several of an entry with several labels or captions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown when the entries were tried
        return [_sample(one, pipe) for one in previews]


@torch.no_grad()
def _sample(one: OwnPreview, pipe: STDiTPipeline) -> list[Preview]:
    args, count = one.args, one.call.num_clips
    inputs = [clip._replace(pixels=clip.pixels.expand(count, *clip.pixels.shape[1:])) for clip in one.inputs]
    clips: Any = sampling.CALLS[args.task](pipe, inputs, args, one.call.keywords())
    if not isinstance(clips, torch.Tensor):  # a stream of groups of frames
        clips = torch.cat(list(clips), dim=2)
    fps = (args.fps or pipe.config.fps) * (args.factor if args.task == "interpolate" else 1)
    return [Preview(_name(one, pipe, i), to_uint8(clip), fps) for i, clip in enumerate(clips)]


def _name(one: OwnPreview, pipe: STDiTPipeline, index: int) -> str:
    record = sampling.clip_record(pipe, one.call, index)
    what = record["caption"] or record["label_name"]
    return one.args.task if what is None else f"{one.args.task} {what}"

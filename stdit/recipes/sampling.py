"""The clips of `stdit sample`: inputs are read, the pipeline is called, and clips are written with their settings."""

import argparse
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stdit.conditions import Actions
from stdit.data.inputs import Input, fit_inside, read_input, read_mask
from stdit.files import claimed, printable, write_json
from stdit.ranges import exact
from stdit.recipes.adapters import add_loras
from stdit.recipes.models import load_pipeline
from stdit.recipes.outputs import output_paths, refuse_existing, write_clips
from stdit.recipes.sample_tasks import TASK_OPTIONS, TASKS, check_options
from stdit.sampling.inputs import with_guider
from stdit.sampling.options import SamplingOptions, options_from
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.tasks import outpaint_canvas

NEW_FRAMES = 12  # frames that connect and loop generate without --frames: three latent frames of a VAE of stride 4


def _generate(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe(num_frames=args.frames, height=args.height, width=args.width, num_videos=args.num_clips, **call)


def _animate(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe.animate(inputs[0].pixels, args.frames, **call)


def _extend(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    """The extended clip; from a causal model a stream of groups of frames, in constant memory."""
    pixels = inputs[0].pixels
    if args.before or not pipe.can_stream(pixels, call["options"]):
        return pipe.extend(pixels, args.after, args.before, **call)
    stream = pipe.stream(pixels, args.after, **call)
    groups = args.after // pipe.video_vae.stride[0]
    return chain(
        [pixels], pipe.engine.progress(stream, call["options"].progress, total=groups, desc="groups of frames")
    )


def _connect(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe.connect(inputs[0].pixels, inputs[1].pixels, args.frames or NEW_FRAMES, **call)


def _loop(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe.loop(inputs[0].pixels, args.frames or NEW_FRAMES, **call)


def _interpolate(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe.interpolate(inputs[0].pixels, args.factor, **call)


def _inpaint(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    (source,) = inputs
    if args.mask:
        (frames, height, width), fps = source.pixels.shape[2:], args.fps or pipe.config.fps
        mask = read_mask(args.mask, source.source, clip=(frames, height, width), fps=fps, frames=args.frames)
        return pipe.inpaint(source.pixels, mask, **call)
    pixels, mask = outpaint_canvas(source.pixels, args.height or pipe.config.height, args.width or pipe.config.width)
    return pipe.inpaint(pixels, mask, **call)


def _edit(pipe: STDiTPipeline, inputs: list[Input], args: argparse.Namespace, call: dict[str, Any]) -> Any:
    return pipe.edit(inputs[0].pixels, args.strength, **call)


CALLS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "animate": _animate,
    "extend": _extend,
    "connect": _connect,
    "loop": _loop,
    "interpolate": _interpolate,
    "inpaint": _inpaint,
    "edit": _edit,
}


def read_inputs(args: argparse.Namespace, pipe: STDiTPipeline, say: Callable[[str], Any] = print) -> list[Input]:
    """Read the --input files at the model's size and frame rate, or those of the command line; notes go to `say`."""
    trained = (pipe.config.height, pipe.config.width)
    size: Any = (args.height or trained[0], args.width or trained[1])
    if args.task == "inpaint" and not args.mask:  # outpainting: the whole picture inside the larger frame
        size = partial(fit_inside, frame=size, trained=trained)
    frames = args.frames if TASKS[args.task].trims else None
    inputs = [read_input(path, size, args.fps or pipe.config.fps, frames) for path in args.input]
    for path, clip in zip(args.input, inputs, strict=True):
        if clip.note:
            say(printable(f"{path}: {clip.note}"))
    return inputs


class Call(NamedTuple):
    """One call of the pipeline.

    num_clips: the number of clips it gives. labels (B,): their classes, if any. captions: one, or one per clip. negative:
    what guidance leads away from, by keyword. actions: of the last frames, one for each.
    """

    options: SamplingOptions
    num_clips: int
    labels: torch.Tensor | None
    captions: list[str] | None
    negative: dict[str, Any]
    actions: list[int | str] | None = None

    def keywords(self) -> dict[str, Any]:
        """Keywords of every task."""
        given: dict[str, Any] = {"captions": self.captions} if self.captions else {}
        given |= {"actions": self.actions} if self.actions else {}
        return {"class_labels": self.labels, "options": self.options, **given, **self.negative}


def build_call(args: argparse.Namespace, pipe: STDiTPipeline, options: SamplingOptions) -> Call:
    """Labels, captions and number of clips; without both, `generate` has one clip per class, at most 12.

    With --num-videos, labels and captions are repeated in turn up to that number.
    """
    generating, classes, captions = args.task == "generate", pipe.transformer.num_classes, args.caption
    labels = args.class_label
    if not labels and classes and generating and not captions:
        labels = list(range(classes if args.num_videos else min(classes, 12)))
        labels = labels[: args.num_videos]
    given = {len(values) for values in (labels, captions) if values and len(values) > 1}
    if len(given) > 1:
        raise ValueError(
            f"{len(labels)} labels and {len(captions)} captions do not fit together; give as many of both, or one of them."
        )
    count = args.num_videos or max([len(values) for values in (labels, captions) if values] or [4 if generating else 1])
    if any(n > count for n in given):
        raise ValueError(
            f"--num-videos {count} is less than the {max(given)} labels or captions; raise it, or give fewer."
        )
    numbers = pipe.labels(_rounds(labels, count))
    away = {"negative_class_labels": args.negative_class_label, "negative_captions": args.negative_caption}
    negative = {keyword: values[0] if len(values) == 1 else values for keyword, values in away.items() if values}
    return Call(
        options, count, labels=numbers if labels else None, captions=_rounds(captions, count), negative=negative,
        actions=_held(args.actions, pipe),
    )  # fmt: skip


def _held(actions: list[str], pipe: STDiTPipeline) -> list[int | str] | None:
    """Each action for as many frames as one lasts in the model's data; None for none. ValueError if it takes no names."""
    if not actions:
        return None
    condition = pipe.transformer.conditioners.get("actions")
    if not isinstance(condition, Actions) or condition.width is not None:
        if condition is None:
            raise ValueError(f"--actions {actions[0]}: this model takes no actions; leave it out.")
        raise ValueError(
            f"--actions {actions[0]}: this model takes actions of several numbers, which --actions cannot give; use Python."
        )
    numbers = [condition.number(int(one) if one.isdecimal() else one) for one in actions]
    return [number for number in numbers for _ in range(condition.space.repeat)]


def _rounds(values: list | None, count: int) -> list | None:
    """So many values, which go round; None for none."""
    return [values[i % len(values)] for i in range(count)] if values else None


def describe_settings(args: argparse.Namespace, pipe: STDiTPipeline, model: Path, call: Call) -> dict[str, Any]:
    """The settings that are written to the JSON file of every clip, and hashed into its name."""
    frames = args.frames or (pipe.config.num_frames if args.task == "generate" else None)
    return {
        "model": str(model), "task": args.task, "class_labels": args.class_label, "captions": args.caption, **call.negative,
        **({"actions": args.actions} if args.actions else {}), **({"lora": args.lora} if args.lora else {}),
        "num_frames": frames, "height": args.height or pipe.config.height, "width": args.width or pipe.config.width,
        **dataclasses.asdict(call.options), **{name: getattr(args, name) for name in ("input", "pos_scaling", "num_videos", *TASK_OPTIONS)},
    }  # fmt: skip


def clip_record(pipe: STDiTPipeline, call: Call, index: int) -> dict[str, Any]:
    """Number, label and caption of one clip, for its JSON file."""
    names, captions = pipe.transformer.config.class_names, call.captions
    label = None if call.labels is None else int(call.labels[index])
    name = names[label] if names and label is not None and label < len(names) else label
    caption = captions[index] if captions else None
    return {"clip": index, "label": label, "label_name": name, "caption": caption}


class Sampled(NamedTuple):
    """What a command wrote. size: frames, height, width of each clip. warnings: one line each."""

    paths: list[Path]
    size: tuple[int, int, int]
    fps: float
    call: Call
    warnings: list[str]


def sample_clips(
    args: argparse.Namespace,
    pipe: STDiTPipeline,
    model: Path,
    *,
    progress: bool | Callable[..., Any] = True,
    say: Callable[[str], Any] = print,
) -> Sampled:
    """Sample the clips of a parsed command line and write them, each with a JSON file of its settings."""
    options = options_from(args)
    check_options(args)
    if args.pos_scaling:
        for model_part in filter(None, (pipe.transformer, pipe.guide)):
            model_part.set_pos_scaling(args.pos_scaling)
    inputs = read_inputs(args, pipe, say)
    call = build_call(args, pipe, options)
    args.num_clips = call.num_clips
    inputs = [clip._replace(pixels=clip.pixels.expand(call.num_clips, *clip.pixels.shape[1:])) for clip in inputs]
    settings = describe_settings(args, pipe, model, call)
    task = TASKS[args.task]
    is_image = (
        settings["num_frames"] == 1 if args.task == "generate" else task.keeps_image and inputs[0].pixels.shape[2] == 1
    )
    suffix = ".png" if is_image else ".gif" if args.gif else ".mp4"
    records = [clip_record(pipe, call, i) for i in range(call.num_clips)]
    texts = [str(one["caption"] or ("" if one["label_name"] is None else one["label_name"])) for one in records]
    paths = output_paths(args, model, texts=texts, suffix=suffix, settings=settings)
    # What is written says how the clip was made, whatever the defaults become.
    settings |= pipe.engine.resolved(with_guider(options, call.negative))
    unused = [name for name in TASK_OPTIONS if name not in task.options]
    settings = {name: value for name, value in settings.items() if name not in unused}
    fps = (args.fps or pipe.config.fps) * (args.factor if args.task == "interpolate" else 1)
    with claimed(paths), warnings.catch_warnings(record=True) as caught:
        refuse_existing(paths, args.overwrite)  # another process may have written them since
        keywords = {**call.keywords(), "options": dataclasses.replace(options, progress=progress)}
        clips = CALLS[args.task](pipe, inputs, args, keywords)
        for i, (path, size) in enumerate(zip(paths, write_clips(paths, clips, fps), strict=True)):
            written = dict(zip(("num_frames", "height", "width"), size, strict=True))
            try:
                write_json(path.with_suffix(".json"), {**settings, **written, "fps": fps, **records[i]})
            except OSError:
                path.unlink()  # a clip without its record would be in the way of the next attempt
                raise
    warned = [printable(text) for text in dict.fromkeys(str(warning.message) for warning in caught)]
    return Sampled(paths, size, fps, call, warnings=warned)


def sample(args: argparse.Namespace, model: Path) -> None:
    """Load a model, sample the clips of a parsed command line, and say what was written."""
    pipe = load_pipeline(model)
    add_loras(pipe, args.lora)
    paths, size, fps, call, warned = sample_clips(args, pipe, model)
    for text in warned:
        print(f"warning: {text}")
    written_to = paths[0] if len(paths) == 1 else paths[0].parent
    guidance = pipe.engine.guidance(call.options)
    print(
        f"{model}: {args.task}, {call.num_clips} clip(s), {' x '.join(map(str, size))} at {fps:g} fps, {call.options.num_inference_steps} steps, guidance {exact(guidance.scale)}, seed {args.seed}: {written_to}"
    )

"""The results of a run: the exported pipeline, samples, real clips to compare them with, and pictures."""

import copy
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from stdit.data.datasets import Dataset
from stdit.data.rates import DEFAULT_FPS, clip_rate
from stdit.data.video_io import VideoError
from stdit.data.video_write import to_uint8, write_contact_sheet, write_video
from stdit.files import atomic_write, plain_name, write_text
from stdit.model.lora import base_fingerprint, save_lora
from stdit.model.stdit import STDiT
from stdit.pixels import to_float
from stdit.rng import keyed_rng
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.loop_state import load_weights
from stdit.training.parallel import computing_device, gathered, is_sharded
from stdit.training.run import RunFolders
from stdit.vae import VideoVAE

LORA = "default"  # the name of the LoRA that is trained, in its model


def build_pipeline(
    model: STDiT,
    vae: VideoVAE,
    config: Any,
    fps: float | None = None,
    *,
    guide: Mapping[str, Tensor] | None = None,
) -> STDiTPipeline:
    """Build the pipeline of a model in training; `config` is a `stdit.config.Config`, fps: the rate of its clips.

    guide: the weights of a weaker model of the same kind, which guidance leads away from.
    """
    weaker = None
    if guide is not None:
        weaker = copy.deepcopy(model).eval().requires_grad_(False)
        load_weights(weaker, guide, "the guide")
    data, objective = config.data, config.objective
    scheduler = STDiTScheduler(
        objective.name,
        objective.sampling_shift or objective.shift,
        solver="flow_map" if objective.flow_map else None,
        shift_tokens=objective.shift_tokens,
        betas=objective.betas,
        learn_sigma=objective.learn_sigma,
    )
    return STDiTPipeline(
        model,
        vae,
        scheduler,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=fps or data.fps or DEFAULT_FPS,
        objective=objective.name,
        vae_fingerprint=vae.fingerprint(),
        mask_strategies=sorted(objective.active_mask_probs),
        text_encoder=config.text.encoder,
        guide=weaker,
        history_noise=config.train.history_noise,
    )


def whole_model(model: STDiT, keep: bool, device: torch.device | None = None) -> STDiT | None:
    """The model, or of a sharded one a whole copy if `keep` (else None); all processes must call it.

    device: of the copy; None: where the model computes.
    """
    if not is_sharded(model):
        return model
    weights = gathered(model.state_dict().items(), keep=keep)
    if not keep:
        return None
    with init_empty_weights():  # drawing weights would take longer than gathering them
        copied = STDiT.from_config(dict(model.config))
    copied.load_state_dict(weights, assign=True)
    return copied.to(device or computing_device(next(model.parameters()))).requires_grad_(False).eval()


def preview_conditions(pipeline: STDiTPipeline, dataset: Dataset, count: int) -> dict[str, Any]:
    """Arguments of a pipeline call for `count` clips: labels spread over the classes, captions of the data, their number."""
    found: dict[str, Any] = {"num_videos": count}
    for conditioner in pipeline.transformer.conditioners.values():
        found |= conditioner.preview(dataset.record, len(dataset), count, frames=pipeline.config.num_frames)
    return found


class Preview(NamedTuple):
    """A clip (F, H, W, 3) uint8 that shows how far training has come: what it is called, and its frames per second."""

    name: str
    frames: np.ndarray
    fps: float


def preview_count(config: Any) -> int:
    """The number of clips that a run shows now and then."""
    return min(12, config.train.samples) or 1


def preview(pipeline: STDiTPipeline, config: Any, dataset: Dataset, numbers: Sequence[int]) -> list[Preview]:
    """Some of the `preview_count` clips of the conditions of the data, each always from its own noise."""
    count = preview_count(config)
    given = preview_conditions(pipeline, dataset, count)
    texts = texts_of(pipeline, given, count)
    some = {name: [value[i] for i in numbers] if _is_for_each(value, count) else value for name, value in given.items()}
    steps = max(8, config.train.sample_steps // 2)
    clips = _sample(
        pipeline, config, {**some, "num_videos": len(numbers)}, steps=steps, seed=[config.seed + i for i in numbers]
    )
    return [Preview(texts[i], to_uint8(clip), pipeline.config.fps) for i, clip in zip(numbers, clips, strict=True)]


def _is_for_each(value: Any, count: int) -> bool:
    """Whether an argument of a call has a value for each of `count` clips."""
    return isinstance(value, list | tuple | Tensor | np.ndarray) and len(value) == count


def texts_of(pipeline: STDiTPipeline, given: Mapping[str, Any], count: int) -> list[str]:
    """What each of `count` clips shows: its caption, or the name of its class, or nothing. given: of `preview_conditions`."""
    labels, names = given.get("class_labels"), pipeline.transformer.config.class_names
    named = [names[label] if names else f"class {label}" for label in labels or ()]
    return list(given.get("captions") or named or [""] * count)


def write_previews(previews: Sequence[Preview], folder: Path, step: int) -> dict[str, Path]:
    """Write a contact sheet, step-N.png, and each clip to the folder step-N -> the files by name."""
    clips = folder / f"step-{step:07d}"
    clips.mkdir(parents=True, exist_ok=True)
    sheet = clips.with_suffix(".png")
    write_contact_sheet(sheet, [one.frames for one in previews], columns=2, names=[one.name for one in previews])
    files = {"sheet": sheet}
    for number, (text, frames, fps) in enumerate(previews):
        name = "-".join(filter(None, (f"{number:02d}", plain_name(text))))
        files[name] = clips / f"{name}.{'png' if len(frames) == 1 else 'mp4'}"
        write_video(files[name], frames, fps=fps)
    return files


def _sample(
    pipeline: STDiTPipeline, config: Any, given: dict[str, Any], *, steps: int, seed: int | Sequence[int]
) -> Tensor:
    return pipeline(
        **given, num_inference_steps=steps, guidance_scale=config.train.guidance, seed=seed, progress=False,
        precision=config.train.precision,
    )  # fmt: skip


def replace_model(pipeline: STDiTPipeline, folder: Path) -> None:
    """Write a pipeline to a folder. A model that is there is replaced only when the new one is complete.

    ValueError, and nothing is written, if a weight is not finite.
    """
    check_finite(pipeline.transformer, f"{folder} was not written; resume an older checkpoint with a lower train.lr")
    with _replacing(folder) as tmp:
        pipeline.save_pretrained(tmp, safe_serialization=True)


def replace_lora(model: STDiT, folder: Path, base: str, fingerprint: str | None) -> None:
    """Write the LoRA of a training run to a folder, as `replace_model` writes a model.

    base: the model that it was trained for; fingerprint: that of its weights then, None: those of `model`.
    """
    with _replacing(folder) as tmp:
        save_lora(model, LORA, tmp, {"base": base, "base_fingerprint": fingerprint or base_fingerprint(model)})


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A context manager that yields a folder to write to, which takes the place of `folder` when it is complete."""
    before = folder.with_name(f".{folder.name}-before-{os.getpid()}")
    with atomic_write(folder) as tmp:
        yield tmp
        if folder.exists():
            os.rename(folder, before)
    shutil.rmtree(before, ignore_errors=True)


def check_finite(model: nn.Module, remedy: str) -> None:
    """Raise ValueError if a weight of a model is nan or infinite. remedy: what to do, and what was not done."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"the weights {name} have numbers that are not finite; {remedy}.")


def write_results(pipeline: STDiTPipeline, config: Any, folders: RunFolders, *, dataset: Dataset) -> None:
    """Write generated_samples.pt, target_samples.pt (plain tensors (B, 3, F, H, W) in [-1, 1]), clips and a contact sheet."""
    given = preview_conditions(pipeline, dataset, config.train.samples)
    clips = _sample(pipeline, config, given, steps=config.train.sample_steps, seed=config.seed)
    _save(clips, folders.output / "generated_samples.pt")
    labels = given.get("class_labels")
    targets = target_clips(dataset, pipeline.video_vae, labels, count=len(clips), seed=config.seed)
    _save(targets, folders.output / "target_samples.pt")
    suffix = "png" if clips.shape[2] == 1 else "mp4"
    texts = texts_of(pipeline, given, len(clips))
    for i, (text, clip) in enumerate(zip(texts, clips, strict=True)):
        name = "-".join(filter(None, (f"{i:03d}", plain_name(text))))
        write_video(folders.samples / f"{name}.{suffix}", clip, fps=clip_rate(config.data, dataset))
    write_contact_sheet(folders.samples / "contact_sheet.png", list(clips), columns=2, names=texts)
    if "captions" in given:
        write_text(folders.samples / "captions.txt", "\n".join(given["captions"]) + "\n")


def _save(tensor: Tensor, path: Path) -> None:
    with atomic_write(path) as tmp:
        torch.save(tensor, tmp)


def target_clips(dataset: Dataset, vae: VideoVAE, labels: list[int] | None, *, count: int, seed: int) -> Tensor:
    """Real clips (B, 3, F, H, W) in [-1, 1], of the given labels if the data has them."""
    # The clips of a label are searched in random order; a limit of 4096 clips bounds the time on large data sets.
    order = keyed_rng("preview", seed).permutation(len(dataset))[:4096].tolist()
    clips: list[Tensor] = []
    for i in range(count):
        for position, index in enumerate(order):
            if labels is not None and dataset.record(index)["label"] != labels[i]:
                continue
            try:
                sample = dataset.load(index, keyed_rng("preview", seed, i))
            except VideoError:
                continue
            clips.append(_pixels(sample, vae))
            if len(order) > count:
                order.pop(position)
            break
    return torch.stack(clips) if clips else torch.zeros(0)


def _pixels(sample: dict[str, Tensor], vae: VideoVAE) -> Tensor:
    if "pixels" in sample:
        return to_float(sample["pixels"])
    with torch.no_grad():
        return vae.decode(sample["latents"][None].to(vae.device, vae.dtype))[0].clamp(-1, 1).float().cpu()

"""Train variants of one config on the same budget, measure them, and write a page that compares them.

stdit compare conditioning
stdit compare scaling budget.minutes=1 seeds=[0]

Finished runs are not repeated, and stopped runs resume. output/compare/NAME/ gets comparison.md, runs.json, curves.png,
quality.png and a contact sheet of every variant.
"""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from stdit.progress import Progress

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from stdit.conditions import conditioners_of
from stdit.conditions.values import map_tensors
from stdit.config import Config, find_config, load_typed
from stdit.data.indexed import build_indexed
from stdit.data.loader import batches
from stdit.data.shapes import CLASS_NAMES
from stdit.data.video_write import to_uint8, write_contact_sheet
from stdit.diffusion.objective import build_objective
from stdit.evaluation.captions import caption, caption_grid
from stdit.evaluation.compare import Comparison, Run, by_variant, page
from stdit.evaluation.features import distances, load_extractor
from stdit.evaluation.shapes import report
from stdit.files import check_name, write_json, write_text
from stdit.model.cost import clip_flops
from stdit.precision import autocast
from stdit.recipes.build import build_captions, build_model
from stdit.recipes.entry import child_environment, command, command_parser
from stdit.recipes.models import load_pipeline
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.optim import build_optimizers
from stdit.training.results import target_clips
from stdit.training.step import diffusion_losses, to_latents
from stdit.vae import load_vae

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def arguments(spec: Comparison, variant: str, seed: int, steps: int | None) -> list[str]:
    """The overrides of one run, as `key=value`."""
    settings = {**spec.overrides, **spec.variants[variant], "seed": seed, "name": f"{spec.name}-{variant}-{seed}"}
    if steps is not None:
        settings |= {"train.steps": steps, "train.decay_steps": steps}
    return [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in settings.items()]


def read_variant(spec: Comparison, variant: str, seed: int = 0, steps: int | None = None) -> Config:
    """Read the config of one run; ValueError for a flow map, whose step is not that of the other objectives."""
    config = load_typed(Config, spec.base, arguments(spec, variant, seed, steps))
    if config.objective.flow_map:
        raise ValueError(
            f"variant {variant!r} trains a flow map (objective.flow_map), whose steps, targets and losses are not comparable with those "
            "of other objectives; train it with stdit train, and compare clips with stdit evaluate --against."
        )
    return config


class Probe:
    """Measures a variant before its run: its parameters, Gflops, and the time of a step on this machine."""

    def __init__(self, spec: Comparison, variant: str):
        self.config = read_variant(spec, variant)
        dataset, vae = build_indexed(self.config.data), load_vae(self.config.vae.name)
        self.objective, self.vae = build_objective(self.config.objective), vae
        captions = build_captions(self.config, dataset, torch.device("cpu"))
        self.captions = captions
        self.model = build_model(
            self.config, vae, dataset, self.objective, caption_channels=None if captions is None else captions.channels
        )
        settings = self.config.train
        self.optimizers = build_optimizers(self.model, settings.optimizer, settings.lr, settings.weight_decay)
        self.batches = batches(dataset, 0, settings.batch_size)
        self.seconds: list[float] = []
        self.parameters = sum(p.numel() for p in self.model.parameters())
        shape = vae.latent_shape(self.config.data.num_frames, self.config.data.height, self.config.data.width)
        self.gflops = clip_flops(self.model, shape) / 1e9
        ratio = self.config.objective.route_ratio
        self.trained_gflops = clip_flops(self.model, shape, ratio) / 1e9 if ratio else self.gflops
        patches = [n // p for n, p in zip(shape, self.model.patch_size, strict=True)]
        self.tokens = float(np.prod(patches)) * settings.batch_size

    def step(self) -> None:
        """Take and time one training step."""
        batch, began = next(self.batches), time.perf_counter()
        conditioners = conditioners_of(self.model.config)
        if self.captions is not None:
            conditioners["caption"].tokenize = self.captions  # type: ignore[attr-defined]
        conditions = {
            name: c.encode(c.drop(batch.conditions[name], batch.keys, 0.0), 1) for name, c in conditioners.items()
        }
        with autocast(self.config.train.precision, "cpu"):
            losses = diffusion_losses(
                self.model,
                self.objective,
                to_latents(batch, self.vae),
                conditions,
                keys=batch.keys,
                patch=self.model.patch_size,
                route=True,
            )
        losses.clips.mean().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        self.seconds.append(time.perf_counter() - began)


def plan(spec: Comparison, folder: Path) -> dict[str, dict]:
    """Steps, parameters and Gflops of every variant. They are saved, so that a resumed comparison keeps its budget."""
    file, asked = folder / "plan.json", json.loads(json.dumps(asdict(spec)))
    if file.is_file():
        made = json.loads(file.read_text())
        if made["spec"] != asked:
            changed = sorted(key for key in asked if asked[key] != made["spec"].get(key))
            raise ValueError(
                f"{folder} has the results of other settings (differences: {', '.join(changed)}); choose another name=, or remove the folder."
            )
        return made["variants"]
    probes = {name: Probe(spec, name) for name in Progress(spec.variants, desc="building", unit="variant")}
    if spec.budget.kind == "minutes":
        for _ in Progress(range(12), desc="timing", unit="round"):  # in turn, since the speed of a machine varies
            for probe in probes.values():
                probe.step()
    variants = {}
    for name, probe in probes.items():
        seconds = float(np.median(probe.seconds[2:])) if probe.seconds else float("nan")
        batch = probe.config.train.batch_size
        steps = spec.budget.steps_for(
            seconds_per_step=seconds, tokens_per_step=probe.tokens, gflops_per_step=3 * probe.trained_gflops * batch
        )
        variants[name] = {"steps": steps, "parameters": probe.parameters, "gflops": probe.gflops}
    write_json(file, {"spec": asked, "variants": variants})
    return variants


def train_variant(spec: Comparison, variant: str, seed: int, steps: int) -> Path:
    """Train one run in a child process unless it is finished; returns its folder under models/."""
    name = f"{spec.name}-{variant}-{seed}"
    summary = Path("output") / name / "summary.json"
    done = summary.is_file() and json.loads(summary.read_text()).get("finished") and (Path("models") / name).is_dir()
    if not done:
        command = [sys.executable, "-m", "stdit", "train", spec.base, *arguments(spec, variant, seed, steps)]
        code = subprocess.run(command, env=child_environment()).returncode
        if code:
            raise ValueError(
                f"the run {name} ended with exit code {code}; correct what its message above names, and run this command again."
            )
    return Path("models") / name


def measure(spec: Comparison, variant: str, seed: int, *, about: dict, folder: Path) -> Run:
    """Train one run unless it is finished, measure it, and save the result in runs/, so that this happens once."""
    file = folder / "runs" / f"{variant}-{seed}.json"
    if file.is_file():
        return Run(**json.loads(file.read_text()))
    model = train_variant(spec, variant, seed, about["steps"])
    config = read_variant(spec, variant, seed, about["steps"])
    pipe = load_pipeline(model)
    run = Run(variant, seed, spec.variants[variant], **about)
    summary = json.loads((Path("output") / model.name / "summary.json").read_text())
    seconds = max(summary["training_seconds"], 0.1)  # the summary rounds to tenths
    run.minutes, run.clips_per_second = seconds / 60, config.train.batch_size * about["steps"] / seconds
    run.losses = {f"{level:g}": loss for level, loss in zip(LEVELS, held_losses(pipe, config), strict=True)}
    clips = sample_clips(pipe, spec, config)
    names = [f"{shape} {direction}" for _, shape, direction in wanted(spec, config)]
    if sorted(pipe.transformer.config.class_names or []) == sorted(CLASS_NAMES) or config.text.encoder:
        measured = report([to_uint8(clip) for clip in clips], [CLASS_NAMES.index(name) for name in names])
        run.shape, run.direction, run.both = measured.shape, measured.direction, measured.both
    if spec.reference:
        real = target_clips(build_indexed(config.data), pipe.video_vae, None, count=spec.reference, seed=1)
        run.frechet = distances(clips.split(32), real.split(32), load_extractor(spec.features)).frechet
    write_contact_sheet(folder / f"{variant}.png", list(clips[:24]), columns=3)
    file.parent.mkdir(exist_ok=True)
    write_json(file, asdict(run))
    return run


def wanted(spec: Comparison, config: Config) -> list[tuple[str, str, str]]:
    """Colour, shape and direction of every clip to sample: all captions equally often; labels have no colour ("")."""
    if config.text.encoder:
        return caption_grid(None, spec.clips)
    shapes = [CLASS_NAMES[i % len(CLASS_NAMES)].split() for i in range(spec.clips)]
    return [("", shape, direction) for shape, direction in shapes]


def sample_clips(pipe: STDiTPipeline, spec: Comparison, config: Config) -> torch.Tensor:
    """Sample clips (N, 3, F, H, W) of every label or caption in turn, or of none if the model has none."""
    options: dict[str, Any] = {
        "num_inference_steps": spec.sample_steps, "guidance_scale": spec.guidance, "guider": "cfg", "seed": 1, "progress": False,
    }  # fmt: skip
    if config.text.encoder:
        return pipe(captions=[caption(*one) for one in wanted(spec, config)], **options)
    if sorted(pipe.transformer.config.class_names or []) == sorted(CLASS_NAMES):
        return pipe([f"{shape} {direction}" for _, shape, direction in wanted(spec, config)], **options)
    classes = pipe.transformer.num_classes
    return pipe([i % classes for i in range(spec.clips)] if classes else None, num_videos=spec.clips, **options)


@torch.no_grad()
def held_losses(pipe: STDiTPipeline, config: Config) -> list[float]:
    """The loss of the EMA weights at each of `LEVELS`, on 128 clips of the data with fixed noise."""
    objective, dataset = build_objective(config.objective), build_indexed(config.data)
    batch = next(batches(dataset, 10**6, min(128, len(dataset))))
    clips = to_latents(batch, pipe.video_vae)
    model, conditions = pipe.transformer, {}
    for name, conditioner in model.conditioners.items():
        given = batch.conditions[name]
        conditions[name] = conditioner.encode(conditioner.drop(given, batch.keys, 0.0), pipe.video_vae.stride[0])
    conditions = map_tensors(conditions, lambda x: x.to(pipe.device))
    found = []
    for level in LEVELS:
        losses = diffusion_losses(
            model, objective, clips, conditions, keys=batch.keys, patch=model.patch_size, level=level, strategy="shared"
        )
        found.append(float(losses.clips.mean()))
    return found


def draw(spec: Comparison, runs: list[Run], folder: Path, distance: str) -> list[Path]:
    """Plot loss against minutes and quality against Gflops; returns the two files."""
    curves, quality = folder / "curves.png", folder / "quality.png"
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (variant, group) in enumerate(by_variant(runs).items()):
        for run in group:
            with open(
                Path("output") / f"{spec.name}-{variant}-{run.seed}" / "training_metrics.csv", newline=""
            ) as stream:
                loss = np.array([float(row["loss"]) for row in csv.DictReader(stream)])
            size = max(1, len(loss) // 20)
            smooth = np.convolve(loss, np.ones(size) / size, mode="valid")
            minutes = np.linspace(run.minutes * size / len(loss), run.minutes, len(smooth))
            axis.plot(minutes, smooth, color=f"C{i % 10}", alpha=0.8, label=variant if run is group[0] else None)
    axis.set(xlabel="minutes of training", ylabel="loss, smoothed", yscale="log", title=spec.title or spec.name)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(curves, dpi=110)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, key, label in ((axes[0], "frechet", distance), (axes[1], "both", "shape and direction right")):
        for i, (variant, group) in enumerate(by_variant(runs).items()):
            values = [getattr(run, key) for run in group]
            axis.scatter([group[0].gflops] * len(values), values, color=f"C{i % 10}", alpha=0.5, s=18)
            axis.scatter(group[0].gflops, np.mean(values), color=f"C{i % 10}", label=variant, s=60, marker="D")
        axis.set(xlabel="Gflops of a forward pass of one clip", ylabel=label, xscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.savefig(quality, dpi=110)
    plt.close("all")
    return [curves, quality]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and compare every variant."""
    parser = command_parser("compare", __doc__)
    parser.add_argument("comparison", help="a path, or the name of a comparison in the package, such as conditioning")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the comparison, such as budget.minutes=1"
    )
    args = parser.parse_args(argv)
    spec = load_typed(Comparison, find_config(args.comparison, "compare"), args.overrides)
    check_name(spec.name)
    for variant in spec.variants:  # finds every mistake before any work
        check_name(f"{spec.name}-{variant}", "the name of a variant's run")
        read_variant(spec, variant)
    distance = f"{load_extractor(spec.features).frechet} ({load_extractor(spec.features).name})"
    folder = Path("output") / "compare" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    about, runs = plan(spec, folder), []
    todo = [(variant, seed) for seed in spec.seeds for variant in spec.variants]
    for variant, seed in Progress(todo, desc=spec.name, unit="run"):
        runs.append(measure(spec, variant, seed, about=about[variant], folder=folder))
    write_json(folder / "runs.json", [asdict(run) for run in runs])
    pictures = draw(spec, runs, folder, distance)
    text = page(
        spec,
        runs,
        command=f"stdit compare {' '.join([args.comparison, *args.overrides])}",
        pictures=pictures,
        distance=distance,
    )
    write_text(folder / "comparison.md", text)
    print(text)
    print(f"{folder / 'comparison.md'}")
    return 0

"""Train a diffusion transformer on videos or images; run the same command again to resume.

stdit train --data path/to/clips          (looks at the files, proposes a training for this machine, and trains it)
stdit train quickstart train.steps=100
stdit train image_xl2 data.root=path/to/images
stdit train configs/video.yaml --print-config
accelerate launch -m stdit train video          (several processes; or accelerate launch tools/train.py in a checkout)
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import OmegaConf
from torch import nn

from stdit.config import Config, load_typed, to_plain
from stdit.data.cache_locks import reading
from stdit.data.datasets import Dataset
from stdit.data.identity import fingerprint, hash_of
from stdit.data.indexed import build_indexed
from stdit.data.loader import batches
from stdit.data.rates import clip_rate
from stdit.data.samplers import BatchSampler
from stdit.data.workers import num_workers
from stdit.diffusion.objective import build_objective
from stdit.model.lora import base_fingerprint
from stdit.model.stdit import STDiT
from stdit.model.trunks import TRUNKS
from stdit.model.unet import UNet
from stdit.recipes import cache_latents, entry
from stdit.recipes.adapters import build_adapted, check_adapted_captions
from stdit.recipes.build import (
    build_accelerator,
    build_captions,
    build_model,
    build_teacher,
    check_batch,
    check_cache,
    check_context,
    check_same_conditions,
    compiles_blocks,
    split_holdout,
    teacher_fingerprint,
)
from stdit.recipes.entry import command, out_of_memory
from stdit.recipes.order import build_order
from stdit.recipes.previews import read_previews, sample_previews
from stdit.recipes.propose import BASE, data_overrides, find_or_propose, keep
from stdit.recipes.train_arguments import read_arguments
from stdit.training.fit import BadFiles, Stopped, Teacher, Trainer, swap_ema
from stdit.training.held_out import steps_between
from stdit.training.optim import build_optimizers, check_optimizer
from stdit.training.parallel import (
    check_agreement,
    check_shared_folder,
    effective,
    gathered,
    group_of_one,
    leave,
    make_mesh,
    place,
    trained_parameters,
)
from stdit.training.previews import Previews
from stdit.training.results import (
    Preview,
    build_pipeline,
    preview,
    preview_count,
    replace_lora,
    replace_model,
    whole_model,
    write_previews,
    write_results,
)
from stdit.training.resume import candidates, find_checkpoint, set_aside
from stdit.training.run import RunFolders
from stdit.training.state import Checkpoint, manifest_hash, shared_check
from stdit.training.trackers import check_trackers
from stdit.vae import VideoVAE, load_vae


class Run(NamedTuple):
    """A training run that is built and not yet started."""

    config: Config
    dataset: Dataset
    order: BatchSampler
    trainer: Trainer


def build_run(config: Config, accelerator: Accelerator) -> Run:
    """Build all parts, lock the folders, and restore the checkpoint that `train.resume` selects."""
    processes, main = accelerator.num_processes, accelerator.is_main_process
    context = config.train.parallel.context
    check_batch(config, max(1, processes // context))
    check_trackers(config.train.trackers)
    check_optimizer(config.train.optimizer)
    dataset = build_indexed(config.data)
    vae = load_vae(config.vae.name).to(accelerator.device)
    check_cache(dataset, vae)
    objective = build_objective(config.objective)
    # What needs only the config, the rows and the files of the run is refused before captions are encoded, which may take
    # hours; nothing of an earlier run is moved until all is built.
    check_context(config, vae, processes)
    parallel = effective(config.train.parallel, accelerator.device.type, processes)
    mesh = make_mesh(parallel, accelerator.device.type, processes)
    folders = _lock_folders(accelerator, config, sharded=mesh is not None)
    adapted: STDiT | None = None
    if config.train.lora.rank is not None:
        adapted, dataset = build_adapted(config, vae, dataset, objective)
    kept, held_out = split_holdout(config, dataset)
    teacher = build_teacher(config, vae, torch.device("cpu"))  # the device's memory is for the text encoder first
    resolved = _resolved(config, vae, dataset, adapted=adapted, teacher=teacher)
    checkpoint = _agreed_checkpoint(accelerator, config, resolved, folders=folders, vae=vae)
    if teacher is not None and checkpoint is None:  # runs of earlier versions go on
        check_same_conditions(config, teacher.model, dataset)
    set_seed(config.seed)
    # Not under a barrier of accelerate's, which would time out: the processes wait for each other's files.
    captions = build_captions(config, dataset, accelerator.device, share=(accelerator.process_index, processes))
    channels = None if captions is None else captions.channels
    model: STDiT | UNet
    if adapted is not None:
        check_adapted_captions(config, adapted, channels)
        model = adapted
    else:
        model = build_model(config, vae, dataset, objective, caption_channels=channels)
    place(model, parallel, mesh, device=accelerator.device, compiled=compiles_blocks(config, accelerator))
    own = read_previews(config, build_pipeline(model, vae, config), quiet=not main) if config.train.previews else []
    order = build_order(config, kept, vae, patch=model.patch_size, processes=processes // context)
    for part in filter(None, teacher or ()):
        part.to(accelerator.device)
    if main:
        set_aside(config.train, folders, checkpoint)

    # Without the guide: a function that knew the trainer would keep it, and its lock, after an error.
    def sample(model: STDiT, numbers: Sequence[int]) -> list[list[Preview]]:
        pipe = build_pipeline(model, vae, config)
        if own:
            return sample_previews([own[number] for number in numbers], pipe)
        return [[one] for one in preview(pipe, config, dataset, numbers)]

    def write(parts: list[list[Preview]], step: int) -> dict[str, Path]:
        return write_previews([one for part in parts for one in part], folders.samples, step)

    trainer = Trainer(
        accelerator, folders, model,
        build_optimizers(model, config.train.optimizer, config.train.lr, config.train.weight_decay),
        config=config.train, resolved=resolved, objective=objective, vae=vae,
        bad_files=BadFiles(len(dataset), config.data.max_bad_fraction), captions=captions,
        teacher=teacher,
        fps=clip_rate(config.data, dataset) if main else None,  # it warns if the clips' rates differ, which is said once
        held_out=held_out, held_out_every=steps_between(len(order.batch(0))),
        whole_model=whole_model,
        previews=Previews(len(own) or preview_count(config), sample, write, at_end=bool(own)),
    )  # fmt: skip
    if checkpoint is not None:
        trainer.restore(checkpoint)
        accelerator.print(f"resumed from {checkpoint.path}")
    step = config.train.guide_step
    if step is not None and trainer.guide is None and not trainer.step < step <= config.train.steps:
        accelerator.print(
            f"train.guide_step={step} is not among the steps from {trainer.step} to train.steps={config.train.steps}: the model "
            "gets no guide."
        )
    if main:
        folders.write_config(config)
    return Run(config, kept, order, trainer)


def _lock_folders(accelerator: Accelerator, config: Config, *, sharded: bool) -> RunFolders:
    """The folders of a run, which the main process locks; ValueError if others write shards and do not see them."""
    folders = RunFolders(config.name)
    if accelerator.is_main_process:
        folders.lock()
        if config.train.resume != "never":  # which moves what is there
            folders.check_own_model()
    accelerator.wait_for_everyone()
    if sharded and accelerator.num_processes > 1:
        check_shared_folder(accelerator, folders.checkpoints)
    return folders


def _resolved(
    config: Config, vae: VideoVAE, dataset: Dataset, *, adapted: STDiT | None, teacher: Teacher | None
) -> dict[str, Any]:
    """The config as plain values, with fingerprints of what a run is made from; a checkpoint's must be the same."""
    found: dict[str, Any] = {"vae_fingerprint": vae.fingerprint(), "data_fingerprint": fingerprint(dataset)}
    if adapted is not None:
        found["base_fingerprint"] = base_fingerprint(adapted)
    if config.objective.flow_map:
        found["teacher_fingerprint"] = teacher_fingerprint(teacher)
    return {**to_plain(config), **found}


def _agreed_checkpoint(
    accelerator: Accelerator, config: Config, resolved: dict, *, folders: RunFolders, vae: VideoVAE
) -> Checkpoint | None:
    """The checkpoint to resume from; ValueError, in every process, unless all have found it and have one config."""
    seen = candidates(config.train, folders)
    check_agreement(accelerator, {"checkpoint": seen[0] if seen else None, "checkpoints": seen})
    check = shared_check(accelerator.process_index, accelerator.num_processes)
    checkpoint = find_checkpoint(
        config.train,
        folders,
        resolved,
        to_plain(Config()),
        main=accelerator.is_main_process,
        same_vae=vae.has_fingerprint,
        check=check,
    )
    found = None if checkpoint is None else manifest_hash(checkpoint.path)[:12]
    check_agreement(accelerator, {"checkpoint": found, "config": hash_of(resolved)})
    return checkpoint


def fit(run: Run) -> int:
    """Train to the last step, or until a signal; returns the exit code."""
    config, trainer = run.config, run.trainer
    accelerator, model = trainer.accelerator, trainer.model
    accelerator.print(
        f"{config.name}: {_num_parameters(model) / 1e6:.1f} M parameters{_trained(model)}, {len(run.dataset)} samples, "
        f"{model.num_classes} classes, {accelerator.num_processes} process(es) on {accelerator.device}, "
        f"{accelerator.mixed_precision if accelerator.mixed_precision != 'no' else 'fp32'}; step {trainer.step} of {config.train.steps}"
    )
    train = config.train
    if (
        train.schedule != "constant"
        and train.decay_steps is not None
        and trainer.step < train.steps > train.decay_steps
    ):
        accelerator.print(
            f"train.steps={train.steps} goes beyond train.decay_steps={train.decay_steps}, where the learning rate becomes 0: later "
            "steps change nothing. Set both to one number, or train.decay_steps=null for a constant rate."
        )
    workers = num_workers(config.data.workers, getattr(run.dataset, "decodes", True), accelerator.num_processes)
    loader = batches(
        run.dataset, config.seed, config.train.batch_size, trainer.step, micro_batch=config.train.micro_batch,
        process=accelerator.process_index // config.train.parallel.context, processes=trainer.data_processes, order=run.order,
        workers=workers, timeout=config.data.timeout, set_aside=trainer.set_aside,
        captions=None if trainer.captions is None else trainer.captions.read,
    )  # fmt: skip
    try:
        with closing(loader):
            trainer.fit(loader)
    except Stopped as stopped:
        accelerator.print(str(stopped))
        return stopped.code
    return 0


def write_summary_and_results(run: Run, code: int, seconds: float) -> None:
    """Write summary.json after `fit`, and the model and samples if the run is finished. Only the main process writes."""
    config, trainer = run.config, run.trainer
    accelerator, folders = trainer.accelerator, trainer.folders
    if not code:
        with swap_ema(trainer.model, trainer.ema):
            main = accelerator.is_main_process
            # In the host's memory, since the device may have no room for it beside the shards; it is written first.
            model = whole_model(trainer.model, main, torch.device("cpu"))
            guide = None if trainer.guide is None else gathered(trainer.guide.items(), keep=main)
            if not main or model is None:
                return
            pipeline = build_pipeline(model, trainer.vae, config, trainer.fps, guide=guide)
            if config.train.lora.rank is None:
                replace_model(pipeline, folders.model)
            else:
                replace_lora(model, folders.model, config.init_from.path or "", trainer.resolved["base_fingerprint"])
            if config.train.samples:
                write_results(pipeline.to(accelerator.device), config, folders, dataset=run.dataset)
    if not accelerator.is_main_process:
        return
    folders.write_summary(
        {
            "name": config.name, "step": trainer.step, "finished": not code, "training_seconds": round(trainer.seconds, 1),
            "seconds_this_time": round(seconds, 1), "parameters": _num_parameters(trainer.model),
            "samples_in_data": len(run.dataset), "skipped_steps": trainer.skipped, "unreadable_files": trainer.bad_files.found,
            "processes": accelerator.num_processes, "device": str(accelerator.device), "precision": accelerator.mixed_precision,
            "vae": config.vae.name, "vae_fingerprint": trainer.resolved["vae_fingerprint"], "torch": torch.__version__,
        }
    )  # fmt: skip
    folders.unlock()
    if not code:
        what = "model" if config.train.lora.rank is None else "LoRA"
        print(
            f"{what}: {folders.model}   samples: {folders.samples}   curves: {folders.output / 'training_curves.png'}"
        )


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _trained(model: nn.Module) -> str:
    """How many parameters are trained, where it is not all."""
    count = sum(p.numel() for p in trained_parameters(model).values())
    return "" if count == _num_parameters(model) else f", of which {count / 1e6:.2f} M are trained"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train the run of a config; returns the exit code (143 after a signal)."""
    args = read_arguments(argv, __doc__)
    config = load_config(args)
    if args.print_config:
        print(OmegaConf.to_yaml(OmegaConf.structured(config)))
        return 0
    try:
        return _train(config)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ValueError(_needs_less(config, error)) from error


def load_config(args: argparse.Namespace) -> Config:
    """The config of a command line: a named one, or one that is proposed for --data."""
    if args.data is None:
        return load_typed(Config, args.config, args.overrides)
    if args.config is not None:
        config = load_typed(Config, args.config, [*args.overrides, *data_overrides(args.data)])
        if config.data.source == "shapes":
            raise ValueError(
                f"--data {args.data} has no effect with data.source=shapes, which draws its clips; set data.source=auto, or leave "
                "--data out."
            )
        return config
    return _proposed(args)


def _proposed(args: argparse.Namespace) -> Config:
    """The config that is proposed for --data, whose clips are encoded first if the proposal says so."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"--data {args.data} proposes a training from what one process measures; write it to a file first (stdit train "
            f"--data {args.data} --print-config > own.yaml), run the cache-latents command that this prints, and launch own.yaml."
        )
    adapts = next((one for one in args.overrides if one.startswith(("train.lora.", "init_from."))), None)
    if adapts is not None:
        raise ValueError(
            f"--data proposes a model, but {adapts} takes one that is there; name a config, for example stdit train lora "
            f"--data {args.data} init_from.path=MODEL."
        )
    # A hold-out that cannot be, before any clip is encoded: a proposal encodes some to measure how long it takes.
    given = load_typed(Config, BASE, [*args.overrides, *data_overrides(args.data)])
    if given.train.holdout or given.train.holdout_values:
        split_holdout(given, build_indexed(given.data))
    proposal = find_or_propose(args.data, args.overrides, args.minutes)
    print("\n".join(proposal.lines), file=sys.stderr if args.print_config else sys.stdout, flush=True)
    config = proposal.config(args.overrides)
    if not args.print_config:
        # What training would refuse, before all clips are encoded.
        check_optimizer(config.train.optimizer)
        check_trackers(config.train.trackers)
        if config.train.resume != "never":
            RunFolders(config.name).check_own_model()
        keep(proposal, args.data, args.overrides)
        if proposal.cache is not None:
            cache_latents.main(proposal.cache)
    return config


def _train(config: Config) -> int:
    """Build the run, train, and write the results; returns the exit code."""
    began = time.time()
    # The last dual-stream block's text output, and a mask's parameters in a step without a mask, get no gradient.
    unused = TRUNKS[config.model.trunk].has_unused_parameters
    parallel = config.train.parallel
    accelerator = build_accelerator(config.train.precision, unused, timeout=parallel.timeout, offload=parallel.offload)
    alone = parallel.offload and accelerator.num_processes == 1
    with reading(config.data), group_of_one(accelerator.device.type, needed=alone):
        run = build_run(config, accelerator)
        code = fit(run)
        write_summary_and_results(run, code, time.time() - began)
    if accelerator.num_processes > 1:
        leave(code)
    return code


def _needs_less(config: Config, error: Exception) -> str:
    """What to tell a user whose run is larger than the memory: what was asked for, and what takes less."""
    data, train = config.data, config.train
    said = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
    return (
        f"out of memory with batches of {train.micro_batch or train.batch_size} x {data.num_frames} frames x {data.height} x "
        f"{data.width} ({said}); set train.micro_batch to {max(1, (train.micro_batch or train.batch_size) // 2)}, "
        "model.gradient_checkpointing=true, or a smaller data.height and data.width. Checkpoints are whole."
    )


def run(argv: Sequence[str] | None = None) -> int:
    """Run `main` like a command: an error that a user can cause is printed in one line."""
    return entry.run(main, argv)

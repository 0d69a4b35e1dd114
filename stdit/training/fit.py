"""The training of a diffusion model, in the loop of stdit/training/loop.py."""

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from stdit.conditions import Conditions, LearntGuidance, conditioners_of
from stdit.conditions.base import Key
from stdit.conditions.values import map_tensors
from stdit.data.identity import hash_of
from stdit.data.loader import Batch
from stdit.diffusion.masks import choose_strategy
from stdit.diffusion.objective import Objective
from stdit.legacy import aliases
from stdit.model.cost import Shape, flops_of_config
from stdit.model.stdit import STDiT
from stdit.rng import keyed_generator
from stdit.text import CaptionCache
from stdit.training.config import TrainConfig
from stdit.training.held_out import HeldOutDraws
from stdit.training.loop import StepLosses, TrainingLoop
from stdit.training.loop_state import swap_ema
from stdit.training.metrics import LEVELS, Breakdown, level_sums
from stdit.training.noise import Draw, NoiseAhead
from stdit.training.shard_files import part_of
from stdit.training.signals import Stopped
from stdit.training.state import Checkpoint
from stdit.training.step import FlowMapTraining, diffusion_losses, to_latents
from stdit.training.throughput import Work
from stdit.vae import VideoVAE

EDITED_SHARE = 0.4  # of clips without known frames, which a teacher sees under another label than their own

__all__ = ["BadFiles", "Stopped", "Trainer", "TrainingLoop", "diffusion_losses", "swap_ema", "to_latents"]

__getattr__ = aliases(__name__)


@dataclass
class BadFiles:
    """The files that could not be read, and the fraction of `dataset_size` that may be unreadable."""

    dataset_size: int
    max_fraction: float
    found: dict[str, str] = field(default_factory=dict)  # name -> reason

    def add(self, bad: dict[str, str]) -> list[str]:
        """Record the unreadable files of a batch -> the reasons of those that are new."""
        new = {name: reason for name, reason in bad.items() if name not in self.found}
        self.found |= new
        return list(new.values())

    def check(self) -> None:
        """Raise ValueError if there are too many."""
        if len(self.found) > self.max_fraction * self.dataset_size:
            raise ValueError(
                f"{len(self.found)} of {self.dataset_size} files cannot be read, more than data.max_bad_fraction="
                f"{self.max_fraction}; the last: {list(self.found.values())[-1]}"
            )


class Teacher(NamedTuple):
    """A trained model whose velocity a flow map learns, and the weaker model that its guidance leads away from."""

    model: STDiT
    guide: STDiT | None = None


@dataclass
class Trainer(TrainingLoop):
    """A training run of a diffusion model."""

    config: TrainConfig
    objective: Objective
    vae: VideoVAE
    bad_files: BadFiles
    captions: CaptionCache | None = None
    # Files that crashed or stalled their loader process: name -> reason.
    set_aside: dict[str, str] = field(default_factory=dict)
    teacher: Teacher | None = None  # whose velocity a flow map learns
    fps: float | None = None  # frames per second of the clips, for pipelines that are built from a checkpoint
    guide: Mapping[str, Tensor] | None = None  # weights of a weaker model, an earlier state of this run
    held_out: HeldOutDraws | None = None
    held_out_every: int = 1  # steps between measurements of the loss on held-out clips

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flops: dict[Shape, float] = {}
        self.noise = NoiseAhead()
        self.conditioners = conditioners_of(self.model.config)
        if self.captions is not None:
            self.conditioners["caption"].tokenize = self.captions  # type: ignore[attr-defined]

    def further_info(self) -> dict[str, Any]:
        """The files that any process has set aside, the config of the model and the rate of the clips."""
        set_aside = [self.set_aside]
        if self.accelerator.num_processes > 1:
            set_aside = gather_object(set_aside)
        return {
            "set_aside": {name: reason for found in set_aside for name, reason in found.items()},
            "model": dict(self.model.config),
            "fps": self.fps,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint, which files were set aside, and the guide."""
        super().restore(checkpoint)
        self.set_aside |= checkpoint.info.get("set_aside", {})
        if (guide := checkpoint.tensors.get("guide")) is not None:
            weights = self.model.state_dict()
            self.guide = {
                name: part_of(guide, name, weights[name]) if name in weights else guide[name] for name in guide
            }

    def further_tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The weights of the guide, once its step is taken."""
        return {} if self.guide is None else {"guide": self.guide}

    @property
    def breakdown(self) -> Breakdown:
        """The loss by noise level."""
        return LEVELS._replace(held_out=self.held_out is not None)

    def work_of(self, batch: Batch) -> Work:
        """Clips, tokens and operations of a micro-batch; a training step takes three times a forward pass."""
        shapes = self._latent_shapes(batch)
        copies = 2 if self.objective.config.mask_strategy == "teacher_forcing" else 1
        tokens = sum(math.prod(n // p for n, p in zip(one, self.model.patch_size, strict=True)) for one in shapes)
        flops = sum(self._clip_flops((copies * one[0], *one[1:])) for one in shapes)
        groups = self.data_processes
        return Work(len(shapes) * groups, copies * tokens * groups, flops=6 * flops * groups)

    def _clip_flops(self, latent: Shape) -> float:
        """Multiply-adds of a forward pass of a clip of latents, counted once for every shape."""
        if not isinstance(self.model, STDiT):  # a U-Net, whose operations are not counted
            return 0.0
        if latent not in self._flops:
            try:
                self._flops[latent] = flops_of_config(self.model.config, latent, self.objective.config.route_ratio)
            except (ValueError, TypeError, RuntimeError):  # a model that cannot be counted is trained all the same
                self._flops[latent] = 0.0
        return self._flops[latent]

    def _latent_shapes(self, batch: Batch) -> list[Shape]:
        """The latent (T, h, w) of every clip of a batch."""
        if batch.latents is not None:
            return [(int(x.shape[-3]), int(x.shape[-2]), int(x.shape[-1])) for x in batch.latents]
        assert batch.pixels is not None
        patch = self.model.patch_size
        sizes = [(int(x.shape[0]), int(x.shape[1]), int(x.shape[2])) for x in batch.pixels]
        return [self.vae.latent_shape(*size, patch=patch) for size in sizes]

    @property
    def data_processes(self) -> int:
        """The number of groups of processes that share clips (`train.parallel.context`)."""
        return self.accelerator.num_processes // self.config.parallel.context

    @property
    def timeout(self) -> float:
        """That of `train.parallel`."""
        return self.config.parallel.timeout

    @property
    def micro_batches(self) -> int:
        """One with a budget of tokens, else the number that `micro_batch` implies."""
        per_process = self.config.batch_size // self.data_processes
        return 1 if self.config.tokens else per_process // (self.config.micro_batch or per_process)

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """Compute the diffusion loss of each clip of a batch."""
        self._note_bad(batch)
        if getattr(self.model, "context_parallel", None) is not None:
            read = hash_of([batch.keys, sorted(batch.bad), sorted(self.set_aside)])
            self.model.context_parallel.check_same(int(read, 16), self.accelerator.device)
        conditions, clips = self._conditions(batch, training=True), to_latents(batch, self.vae)
        with self.accelerator.autocast():
            given = (clips, conditions, batch.keys)
            losses = diffusion_losses(
                model, self.objective, *given, patch=self.model.patch_size, flow_map=self._flow_map(conditions, batch),
                draw=self.noise, route=True,
            )  # fmt: skip
        return StepLosses(losses.clips, level_sums(losses.clips, losses.levels))

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train to the last step, as the loop does, with noise that is drawn a micro-batch ahead."""
        left = (self.config.steps - self.step) * self.micro_batches
        with closing(self.noise.batches(batches, left, self._draws)) as ahead:
            super().fit(ahead)

    def _draws(self, batch: Batch) -> list[Draw]:
        """The noise that the losses of a batch take."""
        shapes = [(self.vae.channels, *shape) for shape in self._latent_shapes(batch)]
        together = isinstance(batch.pixels if batch.latents is None else batch.latents, Tensor)
        groups: list[tuple[tuple[Key, ...], tuple[int, ...]]] = [(tuple(batch.keys), shapes[0])]
        if not together:
            groups = [((key,), shape) for key, shape in zip(batch.keys, shapes, strict=True)]
        has_history = self.objective.config.mask_strategy == "teacher_forcing"
        return [Draw(purpose, *group) for group in groups for purpose in ("noise", "history")[: 1 + has_history]]

    def after_step(self) -> None:
        """Keep the averaged weights of `guide_step` as the guide."""
        if self.step == self.config.guide_step:
            with swap_ema(self.model, self.ema):
                self.guide = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """The mean loss of the held-out draws, every `held_out_every` steps and after the last."""
        if self.held_out is None or (self.step % self.held_out_every and self.step != self.config.steps):
            return None
        accelerator = self.accelerator
        with swap_ema(self.model, self.ema):
            losses = self.held_out.losses(
                self.loss_of, process=accelerator.process_index, processes=accelerator.num_processes,
                set_aside=self.set_aside,
            )  # fmt: skip
        return accelerator.reduce(losses.to(accelerator.device), "sum").cpu().double().mean().item()

    def loss_of(self, batch: Batch) -> Tensor:
        """The losses (B,) of a batch with the model's weights as they are, and all conditions."""
        self._note_bad(batch)
        conditions = self._conditions(batch, training=False)
        with self.accelerator.autocast():
            return diffusion_losses(
                self.model, self.objective, to_latents(batch, self.vae), conditions, keys=batch.keys,
                patch=self.model.patch_size, flow_map=self._flow_map(conditions, batch),
            ).clips  # fmt: skip

    def _note_bad(self, batch: Batch) -> None:
        """Say which files of a batch could not be read; ValueError if there are too many."""
        for reason in self.bad_files.add(batch.bad):
            self.accelerator.print(f"skipped a file: {reason}")
        self.bad_files.check()

    def _is_edited(self, key: Key) -> bool:
        """Whether a clip gets another label: edits ask for one, and a teacher knows what to do with it."""
        drawn = float(torch.rand((), generator=keyed_generator("guidance", *key, 2)))
        return drawn < EDITED_SHARE and choose_strategy(key, self.objective.config.mask_probs_at(key[1])) == "shared"

    def _flow_map(self, conditions: Conditions, batch: Batch) -> FlowMapTraining | None:
        if not self.objective.config.flow_map:
            return None
        null = {
            name: self.conditioners[name].null(len(batch.keys)) if self.conditioners[name].guided else value
            for name, value in conditions.items()
        }
        null = map_tensors(null, lambda x: x.to(self.accelerator.device))
        return FlowMapTraining(self.model, null, *(self.teacher or ()))

    def _conditions(self, batch: Batch, training: bool) -> Conditions:
        """The conditions of a batch for the model; in training some are dropped, or those of other clips for a teacher."""
        found: Conditions = {}
        if self.captions is not None:
            self.captions.have_ready(batch.captions)
        dropout = self.config.label_dropout if training else 0.0
        redrawn = torch.tensor([training and self.teacher is not None and self._is_edited(key) for key in batch.keys])
        for name, conditioner in self.conditioners.items():
            if isinstance(conditioner, LearntGuidance):
                found[name] = conditioner.value(conditioner.of_keys(batch.keys))
                continue
            if name not in batch.conditions:
                raise ValueError(
                    f"the model takes {name!r}, which the data does not have; give a manifest with it (and cache latents "
                    "again), or train a model without it."
                )
            values = batch.conditions[name]
            if bool(redrawn.any()):
                other = conditioner.redraw(values, batch.keys)
                values = torch.where(redrawn, other, values) if other is not values else values
            values = conditioner.drop(values, batch.keys, dropout)
            found[name] = conditioner.encode(values, self.vae.stride[0])
        return map_tensors(found, lambda x: x.to(self.accelerator.device))

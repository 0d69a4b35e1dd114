"""The training loop: accumulate, clip, step, average, log, save. It receives finished objects and builds none.

`TrainingLoop` is the loop itself, which the VAE's training uses too (stdit/training/vae.py); `Trainer` is that of diffusion models.
"""

import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from stdit.conditions import Conditions, conditioners_of
from stdit.conditions.values import map_tensors
from stdit.data.loader import Batch
from stdit.diffusion.objective import Objective
from stdit.legacy import aliases, renamed_parameter
from stdit.text import CaptionCache
from stdit.training.config import LoopConfig, TrainConfig
from stdit.training.metrics import LEVELS, Breakdown, MetricsLogger, level_sums
from stdit.training.optim import learning_rate, set_learning_rate
from stdit.training.run import RunFolders
from stdit.training.state import Checkpoint, flatten_optimizer, restore_optimizer, save_checkpoint
from stdit.training.step import diffusion_losses, to_latents
from stdit.vae import VideoVAE

__getattr__ = aliases(__name__)


class Stopped(Exception):
    """Raised when a signal stopped the run; its state is saved. `code` is the exit code to use."""

    def __init__(self, code: int, step: int):
        super().__init__(f"stopped at step {step}, everything is saved; run the same command again to go on")
        self.code = code


class StepBatch(Protocol):
    """What the loop itself reads of a batch. keys: (seed, step, slot) per sample; total: samples of the step on all processes."""

    @property
    def keys(self) -> list[tuple[int, int, int]]: ...

    @property
    def total(self) -> int: ...


class StepLosses(NamedTuple):
    """clips (B,): losses to be averaged and minimised; sums (2, n): sums and counts for the n columns of the breakdown."""

    clips: Tensor
    sums: Tensor


class StepMetrics(NamedTuple):
    """What is logged of one optimizer step, still on the device. loss: of this process; sums (2, n): see `StepLosses`."""

    step: int
    loss: Tensor
    sums: Tensor
    lr: float
    grad_norm: Tensor
    skipped: int


def _no_preview(model: nn.Module, step: int) -> None:
    pass


@dataclass
class TrainingLoop(ABC):
    """A training run of any model. Subclasses say what a batch costs (`losses`). Build it, `restore` perhaps, then `fit`."""

    accelerator: Accelerator
    folders: RunFolders
    model: Any  # an nn.Module
    optimizers: list
    config: LoopConfig
    resolved: dict  # the whole config, kept in checkpoints
    step: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.ema = EMAModel(self.model.parameters(), decay=self.config.ema_decay, foreach=True)
        self.ema.to(self.accelerator.device)
        self._signal: int | None = None
        self._skipped_in_a_row = 0

    @property
    @abstractmethod
    def breakdown(self) -> Breakdown:
        """The parts of the loss that are logged in columns of their own."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on this process."""
        return 1

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> StepLosses:
        """Losses of one micro-batch. `model` is `self.model` as prepared by Accelerate (DDP)."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint: weights, their moving average, optimizers, step."""
        tensors, info = checkpoint.tensors, checkpoint.info
        self.model.load_state_dict({renamed_parameter(name): value for name, value in tensors["model"].items()})
        averages = {renamed_parameter(name): value for name, value in tensors["ema"].items()}
        self.step, self.skipped, self.seconds = checkpoint.step, info["skipped"], info["seconds"]
        names = [name for name, _ in self.model.named_parameters()]
        for shadow, name in zip(self.ema.shadow_params, names, strict=True):
            shadow.data.copy_(averages[name])
        self.ema.optimization_step = info["ema_step"]
        for i, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, tensors.get(f"optimizer_{i}", {}), info["optimizers"][i])

    def save(self) -> None:
        """Write a checkpoint (one process does)."""
        if self.accelerator.is_main_process:
            states = [flatten_optimizer(optimizer) for optimizer in self.optimizers]
            names = [name for name, _ in self.model.named_parameters()]
            tensors = {
                "model": dict(self.model.state_dict()),
                "ema": dict(zip(names, self.ema.shadow_params, strict=True)),
            }
            tensors |= {f"optimizer_{i}": state for i, (state, _) in enumerate(states)}
            info = {
                "config": self.resolved, "optimizers": [numbers for _, numbers in states], "skipped": self.skipped,
                "seconds": self.seconds, "ema_step": self.ema.optimization_step,
            }  # fmt: skip
            save_checkpoint(self.folders.checkpoints, self.step, tensors, info, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def fit(self, batches: Iterator[Any], preview: Callable[[Any, int], None] = _no_preview) -> None:
        """Train to `config.steps`; `preview(model, step)` is called with averaged weights every `preview_every` steps.

        Raises Stopped after a signal, ValueError when data or numbers are beyond use.
        """
        config, main = self.config, self.accelerator.is_main_process
        wrapped, *optimizers = self.accelerator.prepare(self.model, *self.optimizers)
        logger = MetricsLogger(self.folders.output, self.step, self.breakdown) if main else None
        metrics: list[StepMetrics] = []
        clips = 0
        before = [signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)]
        progress = tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, dynamic_ncols=True)
        began, mark = time.perf_counter() - self.seconds, time.perf_counter()
        try:
            while self.step < config.steps:
                measured, count = self._one_step(wrapped, optimizers, batches)
                metrics.append(measured)
                clips += count
                self.step += 1
                self.seconds = time.perf_counter() - began
                stopping = self._stopping()
                saving = self.step % config.checkpoint_every == 0 or self.step == config.steps or stopping
                if self.step % config.log_every == 0 or saving:
                    rate = clips / (time.perf_counter() - mark)
                    mark, clips = time.perf_counter(), 0
                    rows = self._gather(metrics, rate)
                    metrics = []
                    if logger is not None:
                        logger.write(rows)
                        progress.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, {rate:.1f} clips/s")
                progress.update(self.step - progress.n)
                if saving:
                    self.save()
                    if logger is not None:
                        logger.curves(last=stopping or self.step == config.steps)
                if stopping:
                    raise Stopped(128 + self._signal if self._signal else 143, self.step)
                if self.step % config.preview_every == 0 and self.step < config.steps:
                    if main:
                        with swap_ema(self.model, self.ema):
                            preview(self.model, self.step)
                    mark, clips = time.perf_counter(), 0
                    self.accelerator.wait_for_everyone()
        finally:
            progress.close()
            if logger is not None:
                logger.close()
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)

    def _one_step(self, model: nn.Module, optimizers: list, batches: Iterator[Any]) -> tuple[StepMetrics, int]:
        """One optimizer step -> its metrics and the number of its clips."""
        config, device = self.config, self.accelerator.device
        total, sums = torch.zeros((), device=device), torch.zeros(2, len(self.breakdown.columns), device=device)
        for part in range(self.micro_batches):
            batch: StepBatch = next(batches)
            share = self.accelerator.num_processes / batch.total  # each process gives its part of the mean over clips
            last = part == self.micro_batches - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                losses = self.losses(model, batch)
                self.accelerator.backward(losses.clips.sum() * share)
            total += losses.clips.detach().sum() * share
            sums += losses.sums
        lr = learning_rate(self.step, config.lr, config.warmup_steps, config.decay_steps)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if math.isfinite(float(norm)):
            set_learning_rate(optimizers, lr)
            for optimizer in optimizers:
                optimizer.step()
            self.ema.step(self.model.parameters())
            self._skipped_in_a_row = 0
        else:
            self._skip(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.model.zero_grad()
        metrics = StepMetrics(self.step + 1, total, sums, lr=lr, grad_norm=torch.as_tensor(norm), skipped=self.skipped)
        return metrics, batch.total

    def _skip(self, batch: StepBatch) -> None:
        """Count a step whose gradient is not finite; it is never applied."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        self.accelerator.print(
            f"step {self.step + 1}: the gradient is not finite; the step is not applied (samples {batch.keys[:4]} ...)"
        )
        if self._skipped_in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"{self._skipped_in_a_row} steps in a row up to step {self.step + 1} had a gradient that is not finite; nothing of them "
                "was applied. Lower train.lr, or use train.precision=fp32, and run again: it resumes from the last checkpoint."
            )

    def _gather(self, metrics: list[StepMetrics], rate: float) -> list[dict]:
        """Rows of the CSV file, losses averaged over processes."""
        totals = self.accelerator.reduce(torch.stack([m.loss for m in metrics]), "mean").tolist()
        sums = self.accelerator.reduce(torch.stack([m.sums for m in metrics]), "sum")
        means = (sums[:, 0] / sums[:, 1]).tolist()  # nan where no clip counted, as for a noise level that none had
        return [
            {
                "step": m.step, "loss": total, "lr": m.lr, "grad_norm": float(m.grad_norm), "skipped": m.skipped,
                "clips_per_second": round(rate, 2), **dict(zip(self.breakdown.columns, values, strict=True)),
            }
            for m, total, values in zip(metrics, totals, means, strict=True)
        ]  # fmt: skip

    def _on_signal(self, number: int, _: Any) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        asked = self._signal is not None
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum") > 0)


@dataclass
class BadFiles:
    """Files that could not be read, and how many are too many: more than `max_fraction` of `dataset_size`."""

    dataset_size: int
    max_fraction: float
    found: dict[str, str] = field(default_factory=dict)  # name -> reason

    def add(self, bad: dict[str, str]) -> list[str]:
        """Record the unreadable files of a batch -> reasons not met before."""
        new = {name: reason for name, reason in bad.items() if name not in self.found}
        self.found |= new
        return list(new.values())

    def check(self) -> None:
        """ValueError when there are too many."""
        if len(self.found) > self.max_fraction * self.dataset_size:
            raise ValueError(
                f"{len(self.found)} of {self.dataset_size} files cannot be read, more than data.max_bad_fraction="
                f"{self.max_fraction}; the last: {list(self.found.values())[-1]}"
            )


@dataclass
class Trainer(TrainingLoop):
    """A training run of a diffusion model."""

    config: TrainConfig
    objective: Objective
    vae: VideoVAE
    bad_files: BadFiles
    captions: CaptionCache | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.conditioners = conditioners_of(self.model.config)
        if self.captions is not None:
            self.conditioners["caption"].tokenize = self.captions  # type: ignore[attr-defined]

    @property
    def breakdown(self) -> Breakdown:
        """The loss by noise level."""
        return LEVELS

    @property
    def micro_batches(self) -> int:
        """One with a budget of tokens, else as many as `micro_batch` asks for."""
        per_process = self.config.batch_size // self.accelerator.num_processes
        return 1 if self.config.tokens else per_process // (self.config.micro_batch or per_process)

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """The diffusion loss of each clip of a batch."""
        for reason in self.bad_files.add(batch.bad):
            self.accelerator.print(f"skipped a file: {reason}")
        self.bad_files.check()
        conditions, clips = self._conditions(batch), to_latents(batch, self.vae)
        with self.accelerator.autocast():
            step = (model, self.objective, clips, conditions, batch.keys)
            losses = diffusion_losses(*step, patch=self.model.patch_size)
        return StepLosses(losses.clips, level_sums(losses.clips, losses.levels))

    def _conditions(self, batch: Batch) -> Conditions:
        """What the model is conditioned on: the batch's conditions, each dropped with probability `label_dropout`."""
        found: Conditions = {}
        for name, conditioner in self.conditioners.items():
            if name not in batch.conditions:
                raise ValueError(
                    f"the model takes {name!r}, which the data does not have; give a manifest with it (and cache latents "
                    "again), or train a model without."
                )
            values = conditioner.drop(batch.conditions[name], batch.keys, self.config.label_dropout)
            found[name] = conditioner.encode(values, self.vae.stride[0])
        return map_tensors(found, lambda x: x.to(self.accelerator.device))


class swap_ema:
    """`with swap_ema(model, ema):` the model holds the averaged weights, in evaluation mode."""

    def __init__(self, model: nn.Module, ema: EMAModel):
        self.model, self.ema = model, ema

    def __enter__(self) -> None:
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.ema.restore(self.model.parameters())
        self.model.train()

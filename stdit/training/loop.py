"""The training loop, whatever it trains: accumulate gradients, clip, step, average weights, log, save.

It receives finished objects and builds none. `Trainer` (stdit/training/fit.py) and `VAETrainer` (stdit/training/vae.py) say
what a batch costs.
"""

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from stdit.progress import Progress
from stdit.training.allocator import reuse_freed_memory
from stdit.training.averages import PowerAverages
from stdit.training.config import LoopConfig
from stdit.training.estimate import Estimate
from stdit.training.heartbeats import Heartbeats
from stdit.training.loop_state import LoopState, swap_ema
from stdit.training.metrics import Breakdown, MetricsLogger, StepMetrics, rows_of
from stdit.training.optim import learning_rate, set_learning_rate
from stdit.training.parallel import accumulating, is_sharded, local_parameters, whole
from stdit.training.previews import Previews
from stdit.training.profile import StepProfiler
from stdit.training.run import RunFolders
from stdit.training.shards import ShardWriter
from stdit.training.signals import Interrupted, Stopped, StopSignals
from stdit.training.state import Checkpoint, save_checkpoint
from stdit.training.throughput import Throughput, Work, summary
from stdit.training.trackers import Trackers


class StepBatch(Protocol):
    """The interface of a batch, as the training loop uses it."""

    @property
    def keys(self) -> list[tuple[int, int, int]]:
        """The (seed, step, slot) of each sample."""

    @property
    def total(self) -> int:
        """The number of samples of the step, over all processes."""


class StepLosses(NamedTuple):
    """The losses of a micro-batch.

    clips: (B,) losses, whose mean is minimised. sums: (2, n) sums and counts for the n columns of the breakdown.
    """

    clips: Tensor
    sums: Tensor


@dataclass
class TrainingLoop(ABC):
    """The training loop of any model; a subclass defines the loss of a batch (`losses`).

    Build it, call `restore` to resume from a checkpoint, then call `fit`.
    """

    accelerator: Accelerator
    folders: RunFolders
    model: Any  # an nn.Module
    optimizers: list
    config: LoopConfig
    resolved: dict  # the whole config, kept in checkpoints
    previews: Previews | None = field(default=None, kw_only=True)
    # Of (model, whether it is kept here): the whole model, which all processes must ask for.
    whole_model: Callable[[Any, bool], Any] = field(default=lambda model, keep: model, kw_only=True)
    step: int = field(default=0, init=False)
    skipped: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.ema = EMAModel(local_parameters(self.model), decay=self.config.ema_decay, foreach=True)
        self.averages = PowerAverages(self.model, self.config.average_lengths)
        self._state = LoopState(self.model, self.ema, self.averages, self.optimizers)
        self.writer: ShardWriter | None = None  # of a sharded model, whose processes each write their part
        if is_sharded(self.model):
            place = (self.folders.checkpoints, self.accelerator.process_index, self.accelerator.num_processes)
            self.writer = ShardWriter(*place, self.config.keep_checkpoints, timeout=self.timeout)
        self.throughput = Throughput(self.accelerator.device, self.accelerator.num_processes)
        self.heartbeats = Heartbeats(self.accelerator.process_index, self.accelerator.num_processes, self.timeout)
        self._signals = StopSignals(says_so=self.accelerator.is_main_process)
        # The manifest hash and the place of the checkpoint that the run began with, see training/resume.py.
        self._origin: dict[str, str | None] = {"origin": None, "origin_path": None}
        self._skipped_in_a_row = 0

    @property
    @abstractmethod
    def breakdown(self) -> Breakdown:
        """The parts of the loss that are logged in separate columns."""

    @property
    def data_processes(self) -> int:
        """The number of processes, or of groups of them, that train on different clips."""
        return self.accelerator.num_processes

    @property
    def timeout(self) -> float:
        """The seconds after which a process that does not answer is given up."""
        return 1800.0

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on this process."""
        return 1

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> StepLosses:
        """Compute the losses of one micro-batch; `model` is `self.model` as prepared by Accelerate (DDP)."""

    def work_of(self, batch: Any) -> Work:
        """What the micro-batches of all processes that are like this one take, for the rates that are logged."""
        return Work(len(batch.keys) * self.data_processes)

    def further_tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Further groups of tensors for the checkpoint."""
        return {}

    def after_step(self) -> None:
        """Called after each step, before it is logged and saved."""
        return

    def held_out_loss(self) -> float | None:
        """The loss of the averaged weights on held-out clips, if it is to be measured after this step."""
        return None

    def further_info(self) -> dict[str, Any]:
        """Further state of the run for the checkpoint, as plain values."""
        return {}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint: weights, their moving average, optimizers, step."""
        self._state.restore(checkpoint)
        info = checkpoint.info
        self.step, self.skipped, self.seconds = checkpoint.step, info["skipped"], info["seconds"]
        self._origin = {key: info.get(key) for key in self._origin}

    def save(self) -> None:
        """Write a checkpoint: the main process, or, of a sharded model, every process its part while training goes on."""
        further, main = self.further_info(), self.accelerator.is_main_process
        if main or self.writer is not None:
            tensors = {**self._state.tensors(), **self.further_tensors()}
            info = {
                **self._state.info(), "config": self.resolved, "skipped": self.skipped, "seconds": self.seconds,
                **self._origin, **further,
            }  # fmt: skip
            folder = self.folders.checkpoints
            if self.writer is not None:
                self.writer.write(self.step, tensors, info)
            else:
                save_checkpoint(folder, self.step, tensors, info, keep=self.config.keep_checkpoints)
            if self.averages.lengths:
                self.averages.write(self.model, folder / "averages", self.step, main=main)
        if self.writer is None:
            self.accelerator.wait_for_everyone()

    def fit(self, batches: Iterator[Any]) -> None:
        """Train to `config.steps`, and show previews of the averaged weights every `preview_every` steps.

        Raises Stopped after a signal, and ValueError if too many files are unreadable, too many gradients are not finite, or
        another process hangs.
        """
        config, main = self.config, self.accelerator.is_main_process
        if self.accelerator.device.type == "cpu":
            reuse_freed_memory()
        wrapped, optimizers = self._prepared()
        logger = self._logger() if main else None
        metrics: list[StepMetrics] = []
        progress = Progress(total=config.steps, initial=self.step, unit="step", disable=not main, dynamic_ncols=True)
        began = time.perf_counter() - self.seconds
        self.throughput.restart()
        estimate = Estimate(self.step, config.steps)
        profiler = StepProfiler(config.profile if main else 0, self.folders.output, config.steps - self.step)
        files: AbstractContextManager = closing(logger) if logger else nullcontext()
        with self._signals, closing(progress), files, self.heartbeats:
            while self.step < config.steps:
                try:
                    measured = self._one_step(wrapped, optimizers, batches)
                except Interrupted:  # this step was not applied
                    stopping = saving = True
                else:
                    self.step += 1
                    self.after_step()
                    profiler.step()
                    self._mark("measuring the held-out loss")
                    with self.throughput.paused():  # the rate is that of training
                        metrics.append(measured._replace(held_out=self.held_out_loss()))
                    self.seconds = time.perf_counter() - began
                    stopping = self._stopping()
                    saving = self.step % config.checkpoint_every == 0 or self.step == config.steps or stopping
                    if main and (message := estimate.after(self.step)):
                        Progress.write(message, file=sys.stderr)
                if metrics and (self.step % config.log_every == 0 or saving):
                    self._mark("averaging losses")
                    rates = self.throughput.rates()
                    rows = rows_of(metrics, self.breakdown, rates, self.accelerator)
                    metrics = []
                    if logger is not None:
                        logger.write(rows)
                        progress.set_postfix_str(f"loss {rows[-1]['loss']:.4f}, {summary(rates)}")
                progress.update(self.step - progress.n)
                if saving:
                    self._mark("saving")
                    with self.throughput.paused():
                        self.save()
                        if logger is not None:
                            logger.curves(last=stopping or self.step == config.steps)
                last = self.step == config.steps
                if self.writer is not None and (stopping or last):
                    self.writer.finish()
                if stopping:
                    raise Stopped(self._signals.code, self.step)
                if self.previews is not None and (
                    self.previews.at_end if last else self.step % config.preview_every == 0
                ):
                    self._mark("sampling previews")
                    with self.throughput.paused():
                        self._preview(self.previews, logger)

    def _mark(self, doing: str) -> None:
        """Tell the other processes what this one does next in its step."""
        self.heartbeats.mark(self.step, doing)

    def _one_step(self, model: nn.Module, optimizers: list, batches: Iterator[Any]) -> StepMetrics:
        """Take one optimizer step -> its metrics."""
        config, device = self.config, self.accelerator.device
        total, sums = torch.zeros((), device=device), torch.zeros(2, len(self.breakdown.columns), device=device)
        for part in range(self.micro_batches):
            self._mark("reading clips")
            batch = self._next(batches)
            self._mark("computing a loss")
            self.throughput.add(self.work_of(batch))
            share = self.data_processes / batch.total  # each process adds its part of the mean over clips
            last = part == self.micro_batches - 1
            with self._accumulating(model, last):
                losses = self.losses(model, batch)
                self._mark("computing gradients")
                self.accelerator.backward(losses.clips.sum() * share)
            total += losses.clips.detach().sum() * share
            sums += losses.sums
        self._mark("applying gradients")
        lr = learning_rate(self.step, config.lr, config.warmup_steps, config.decay_steps, schedule=config.schedule)
        norm = whole(self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm))
        if math.isfinite(float(norm)):
            set_learning_rate(optimizers, lr)
            for optimizer in optimizers:
                optimizer.step()
            self.ema.step(local_parameters(self.model))
            self._skipped_in_a_row = 0
        else:
            self._skip(batch)
        self.averages.update(self.model, self.step + 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.model.zero_grad()
        return StepMetrics(self.step + 1, total, sums, lr=lr, grad_norm=torch.as_tensor(norm), skipped=self.skipped)

    def _prepared(self) -> tuple[nn.Module, list]:
        """The model and the optimizers as Accelerate prepares them; FSDP2 has the place of DDP for a sharded model."""
        if is_sharded(self.model):
            # Shards and their moments are where they must be, which may be the host's memory.
            return self.model, [
                self.accelerator.prepare_optimizer(one, device_placement=False) for one in self.optimizers
            ]
        wrapped, *optimizers = self.accelerator.prepare(self.model, *self.optimizers)
        return wrapped, optimizers

    def _accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """A context manager in which gradients are summed here, and over processes in the last micro-batch."""
        if is_sharded(model):
            return accumulating(model, last)
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _next(self, batches: Iterator[Any]) -> StepBatch:
        """The next batch; in a run of one process a signal ends the wait for it, else all stop after the same step."""
        alone = self.accelerator.num_processes == 1
        with self._signals.ending_waits() if alone else nullcontext(), self.throughput.waiting():
            return next(batches)

    def _logger(self) -> MetricsLogger:
        """What the main process writes of its steps."""
        output = self.folders.output
        trackers = Trackers(self.config.trackers, output, self.step, self.resolved)
        return MetricsLogger(output, self.step, self.breakdown, trackers)

    def _preview(self, previews: Previews, logger: MetricsLogger | None) -> None:
        """Sample previews in all processes; the main one writes them while training goes on."""
        keep = bool(previews.numbers(self.accelerator))
        with swap_ema(self.model, self.ema):
            parts = previews.sample_together(lambda: self.whole_model(self.model, keep), self.step, self.accelerator)
        if parts is not None and logger is not None:
            step = self.step
            logger.show(step, lambda: previews.write(parts, step))

    def _skip(self, batch: StepBatch) -> None:
        """Count a step that is not applied because its gradient is not finite."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        self.accelerator.print(
            f"step {self.step + 1}: the gradient is not finite; the step is not applied (samples {batch.keys[:4]} ...)"
        )
        if self._skipped_in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"{self._skipped_in_a_row} steps in a row up to step {self.step + 1} had a gradient that is not finite, and were not "
                "applied. Lower train.lr, or use train.precision=fp32, and run again: it resumes from the last checkpoint."
            )
        if self.step + 1 == self.config.steps:
            raise ValueError(
                f"the last step, {self.step + 1}, had a gradient that is not finite, so the run is not finished. Lower train.lr, or "
                "use train.precision=fp32, and run again: it resumes from the last checkpoint."
            )

    def _stopping(self) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step."""
        asked = self._signals.asked
        if self.accelerator.num_processes == 1:
            return asked
        self._mark("agreeing to go on")
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum") > 0)

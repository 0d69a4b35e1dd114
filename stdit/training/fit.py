"""The loop: accumulate, clip, step, average, log, save. It receives finished objects and builds none."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from stdit.conditions import Conditions, conditioners_of
from stdit.conditions.values import map_tensors
from stdit.data.loader import Batch
from stdit.diffusion.objective import Objective
from stdit.legacy import renamed_parameter
from stdit.model.stdit import STDiT
from stdit.text import CaptionCache
from stdit.training.config import TrainConfig
from stdit.training.metrics import BINS, MetricsLogger, level_sums
from stdit.training.optim import learning_rate, set_learning_rate
from stdit.training.run import RunFolders
from stdit.training.state import Checkpoint, flatten_optimizer, restore_optimizer, save_checkpoint
from stdit.training.step import diffusion_losses, to_latents
from stdit.vae import VideoVAE


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved. `code` is the exit code to use."""

    def __init__(self, code: int, step: int):
        super().__init__(f"stopped at step {step}, everything is saved; run the same command again to go on")
        self.code = code


@dataclass
class Trainer:
    """Everything a training run is made of. Build it, `restore` perhaps, then `fit`."""

    accelerator: Accelerator
    folders: RunFolders
    model: STDiT
    optimizers: list
    objective: Objective
    vae: VideoVAE
    config: TrainConfig
    resolved: dict  # the whole config, kept in checkpoints
    dataset_size: int
    max_bad_fraction: float
    preview: Callable[[nn.Module, int], None] = lambda model, step: None
    captions: CaptionCache | None = None
    step: int = 0
    skipped: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.ema = EMAModel(self.model.parameters(), decay=self.config.ema_decay, foreach=True)
        self.ema.to(self.accelerator.device)
        self.conditioners = conditioners_of(self.model.config)
        if self.captions is not None:
            self.conditioners["caption"].tokenize = self.captions  # type: ignore[attr-defined]
        self._signal: int | None = None
        self._in_a_row = 0

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint: weights, average, optimizers, step."""
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
            save_checkpoint(self.folders.checkpoints, self.step, tensors, info, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train to `config.steps`. Raises Stopped after a signal, ValueError when data or numbers are beyond use."""
        config, main = self.config, self.accelerator.is_main_process
        wrapped, *optimizers = self.accelerator.prepare(self.model, *self.optimizers)
        per_process = config.batch_size // self.accelerator.num_processes
        parts = 1 if config.tokens else per_process // (config.micro_batch or per_process)
        record = MetricsLogger(self.folders.output, self.step) if main else None
        rows: list[tuple] = []
        clips = 0
        before = [signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)]
        progress = tqdm(total=config.steps, initial=self.step, unit="step", disable=not main, dynamic_ncols=True)
        began, mark = time.perf_counter() - self.seconds, time.perf_counter()
        try:
            while self.step < config.steps:
                row, count = self._one_step(wrapped, optimizers, batches, parts)
                rows.append(row)
                clips += count
                self.step += 1
                self.seconds = time.perf_counter() - began
                stopping = self._stopping()
                saving = self.step % config.checkpoint_every == 0 or self.step == config.steps or stopping
                if self.step % config.log_every == 0 or saving:
                    rate = clips / (time.perf_counter() - mark)
                    mark, clips = time.perf_counter(), 0
                    written = self._gather(rows, rate)
                    rows = []
                    if record is not None:
                        record.write(written)
                        progress.set_postfix_str(f"loss {written[-1]['loss']:.4f}, {rate:.1f} clips/s")
                progress.update(self.step - progress.n)
                if saving:
                    self.save()
                    if record is not None:
                        record.curves()
                if stopping:
                    raise Stopped(128 + self._signal if self._signal else 143, self.step)
                if self.step % config.preview_every == 0 and self.step < config.steps:
                    if main:
                        with averaged(self.model, self.ema):
                            self.preview(self.model, self.step)
                    mark, clips = time.perf_counter(), 0
                    self.accelerator.wait_for_everyone()
        finally:
            progress.close()
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)

    def _one_step(self, model: nn.Module, optimizers: list, batches: Iterator[Batch], parts: int) -> tuple:
        """One optimizer step over `parts` micro-batches -> what the record needs, still on the device, and its clips."""
        config, device = self.config, self.accelerator.device
        total, sums = torch.zeros((), device=device), torch.zeros(2, BINS, device=device)
        for part in range(parts):
            batch = next(batches)
            self._count_bad(batch)
            conditions, clips = self._conditions(batch), to_latents(batch, self.vae)
            share = self.accelerator.num_processes / batch.total  # each process gives its part of the mean over clips
            last = part == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                with self.accelerator.autocast():
                    step = (model, self.objective, clips, conditions, batch.keys)
                    losses = diffusion_losses(*step, patch=self.model.patch_size)
                self.accelerator.backward(losses.clips.sum() * share)
            total += losses.clips.detach().sum() * share
            sums += level_sums(losses.clips, losses.levels)
        lr = learning_rate(self.step, config.lr, config.warmup_steps, config.decay_steps)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if math.isfinite(float(norm)):
            set_learning_rate(optimizers, lr)
            for optimizer in optimizers:
                optimizer.step()
            self.ema.step(self.model.parameters())
            self._in_a_row = 0
        else:
            self._skip(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.model.zero_grad()
        return (self.step + 1, total, sums, lr, torch.as_tensor(norm), self.skipped), batch.total

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

    def _skip(self, batch: Batch) -> None:
        """A step whose gradient is not finite is never applied."""
        self.skipped += 1
        self._in_a_row += 1
        self.accelerator.print(
            f"step {self.step + 1}: the gradient is not finite; the step is not applied (samples {batch.keys[:4]} ...)"
        )
        if self._in_a_row >= self.config.max_skipped:
            raise ValueError(
                f"{self._in_a_row} steps in a row up to step {self.step + 1} had a gradient that is not finite; nothing of them "
                "was applied. Lower train.lr, or use train.precision=fp32, and run again: it resumes from the last checkpoint."
            )

    def _count_bad(self, batch: Batch) -> None:
        for name, reason in batch.bad.items():
            if name not in self.bad:
                self.bad[name] = reason
                self.accelerator.print(f"skipped a file: {reason}")
        if len(self.bad) > self.max_bad_fraction * self.dataset_size:
            raise ValueError(
                f"{len(self.bad)} of {self.dataset_size} files cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction}; the last: {list(self.bad.values())[-1]}"
            )

    def _gather(self, rows: list[tuple], rate: float) -> list[dict]:
        """Rows as plain numbers, losses averaged over processes."""
        totals = self.accelerator.reduce(torch.stack([row[1] for row in rows]), "mean").tolist()
        sums = self.accelerator.reduce(torch.stack([row[2] for row in rows]), "sum")
        by_level = (sums[:, 0] / sums[:, 1]).tolist()  # nan where no clip had such a level
        return [
            {
                "step": step, "loss": total, "lr": lr, "grad_norm": float(norm), "skipped": skipped,
                "clips_per_second": round(rate, 2), **{f"loss_level_{i}": value for i, value in enumerate(levels)},
            }
            for (step, _, _, lr, norm, skipped), total, levels in zip(rows, totals, by_level, strict=True)
        ]  # fmt: skip

    def _on_signal(self, number: int, _) -> None:
        self._signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait

    def _stopping(self) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        asked = self._signal is not None
        if self.accelerator.num_processes == 1:
            return asked
        return bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device), "sum") > 0)


class averaged:
    """`with averaged(model, ema):` the model holds the averaged weights."""

    def __init__(self, model: nn.Module, ema: EMAModel):
        self.model, self.ema = model, ema

    def __enter__(self) -> None:
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        self.model.eval()

    def __exit__(self, *_) -> None:
        self.ema.restore(self.model.parameters())
        self.model.train()

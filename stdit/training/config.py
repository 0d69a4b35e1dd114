"""Settings of a training run: those of every training loop, and those of diffusion training."""

from dataclasses import dataclass
from typing import Literal

_POSITIVE = ("steps", "checkpoint_every", "log_every", "preview_every", "max_skipped")


@dataclass
class LoopConfig:
    """Settings of the training loop, whatever it trains."""

    steps: int = 400_000  # optimizer steps
    decay_steps: int | None = None  # step at which the learning rate reaches zero; null: a constant rate
    warmup_steps: int = 0  # steps in which the rate rises from zero
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 1e-4  # learning rate
    weight_decay: float = 0.0  # decoupled weight decay
    clip_norm: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999  # decay of the averaged weights, which are exported
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where the device has it, fp32, or auto
    resume: str = "auto"  # auto, never, or the path of a checkpoint or of a folder of them
    allow_changes: bool = False  # resume although the config differs
    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept, 2 or more
    log_every: int = 50  # steps between lines of the log
    preview_every: int = 5000  # steps between sampled previews
    max_skipped: int = 20  # steps in a row with a non-finite loss or gradient, after which a run stops

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}.")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"train.decay_steps must be >= 1 or null, got {self.decay_steps}.")
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError(f"train.lr and train.clip_norm must be > 0, got {self.lr} and {self.clip_norm}.")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"train.warmup_steps and train.weight_decay must be >= 0, got {self.warmup_steps} and {self.weight_decay}."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}.")
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"train.keep_checkpoints must be >= 2, got {self.keep_checkpoints}, since the newest checkpoint may be damaged."
            )


@dataclass
class TrainConfig(LoopConfig):
    """Settings of diffusion training. `batch_size` counts clips per optimizer step over all processes."""

    batch_size: int = 256  # clips per optimizer step over all processes
    tokens: int | None = None  # with data.sizes, in place of batch_size: patches per step over all processes
    micro_batch: int | None = None  # clips at a time on one process; fewer take less memory; null: all
    label_dropout: float = 0.1  # probability that a clip is trained without a condition, for guidance
    samples: int = 16  # clips sampled at the end
    sample_steps: int = 30  # solver steps of previews and samples
    guidance: float = 2.0  # guidance scale of previews and samples

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be >= 1, got {getattr(self, name)}.")
        for name in ("micro_batch", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be >= 1 or null, got {value}.")
        if self.samples < 0:
            raise ValueError(f"train.samples must be >= 0, got {self.samples}.")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"train.label_dropout must be in [0, 1), got {self.label_dropout}.")

"""What of training a person chooses."""

from dataclasses import dataclass
from typing import Literal

from stdit.precision import Precision


@dataclass
class TrainConfig:
    """`batch_size` counts clips of an optimizer step over all processes; schedules end at `decay_steps` (null: never)."""

    steps: int = 400_000  # optimizer steps
    decay_steps: int | None = None  # step at which the learning rate has fallen to zero; null: constant
    warmup_steps: int = 0  # steps in which the rate rises from zero
    batch_size: int = 256  # clips per optimizer step over all processes
    tokens: int | None = None  # with data.sizes, in place of batch_size: patches per step over all processes
    micro_batch: int | None = None  # clips at a time on one process; fewer take less memory; null: all
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices by Muon, the rest by AdamW
    lr: float = 1e-4  # learning rate
    weight_decay: float = 0.0  # decoupled weight decay
    clip_norm: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999  # decay of the averaged weights, which are exported
    label_dropout: float = 0.1  # share of clips trained without their condition, for guidance
    precision: Precision = "auto"  # bf16 where the device has it, fp32, or auto
    resume: str = "auto"  # auto, never, or the path of a checkpoint or of a folder of them
    allow_changes: bool = False  # resume although the config differs
    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept, 2 or more
    log_every: int = 50  # steps between lines of the log
    preview_every: int = 5000  # steps between sampled previews
    samples: int = 16  # clips sampled at the end
    sample_steps: int = 30  # solver steps of previews and samples
    guidance: float = 2.0  # guidance scale of previews and samples
    max_skipped: int = 20  # steps in a row with a non-finite loss or gradient before the run stops

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "batch_size",
            "checkpoint_every",
            "log_every",
            "preview_every",
            "sample_steps",
            "max_skipped",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} is not positive; use 1 or more.")
        for name in ("decay_steps", "micro_batch", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name}={value} is not positive; use 1 or more, or null.")
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError(f"train.lr={self.lr} and train.clip_norm={self.clip_norm} must be positive.")
        if self.warmup_steps < 0 or self.samples < 0 or self.weight_decay < 0:
            raise ValueError(
                "train.warmup_steps, train.samples and train.weight_decay cannot be negative; use 0 or more."
            )
        if not 0 <= self.label_dropout < 1 or not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"train.label_dropout={self.label_dropout} and train.ema_decay={self.ema_decay} lie in [0, 1)."
            )
        if self.keep_checkpoints < 2:
            raise ValueError(
                f"train.keep_checkpoints={self.keep_checkpoints}: at least 2 are kept, as the newest may be damaged."
            )

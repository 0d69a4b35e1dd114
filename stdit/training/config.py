"""What of training a person chooses."""

from dataclasses import dataclass
from typing import Literal

from stdit.precision import Precision


@dataclass
class TrainConfig:
    """`batch_size` counts clips of an optimizer step over all processes; schedules end at `decay_steps` (null: never)."""

    steps: int = 400_000
    decay_steps: int | None = None
    warmup_steps: int = 0
    batch_size: int = 256
    tokens: int | None = None  # with data.sizes: patches of a step over all processes, in place of batch_size
    micro_batch: int | None = None  # clips at a time on one process; fewer take less memory
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    precision: Precision = "auto"
    resume: str = "auto"  # auto, never, or the path of a checkpoint or of a folder of them
    allow_changes: bool = False  # resume although the config is another one
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    log_every: int = 50
    preview_every: int = 5000
    samples: int = 16  # clips sampled at the end
    sample_steps: int = 30
    guidance: float = 2.0
    max_skipped: int = 20  # steps in a row with a loss or gradient that is not finite

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

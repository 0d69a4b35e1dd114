"""Settings of a training run: those of every training loop, and those of diffusion training."""

from dataclasses import dataclass
from typing import Literal

from stdit.ranges import check_ranges

_LOOP_RANGES = {
    "steps": "[1, inf)", "decay_steps": "[1, inf)", "warmup_steps": "[0, inf)", "lr": "(0, inf)", "weight_decay": "[0, inf)",
    "clip_norm": "(0, inf)", "ema_decay": "[0, 1)", "checkpoint_every": "[1, inf)", "keep_checkpoints": "[2, inf)",
    "log_every": "[1, inf)", "preview_every": "[1, inf)", "max_skipped": "[1, inf)",
}  # fmt: skip
_TRAIN_RANGES = {
    "batch_size": "[1, inf)", "tokens": "[1, inf)", "micro_batch": "[1, inf)", "label_dropout": "[0, 1)", "samples": "[0, inf)",
    "sample_steps": "[1, inf)", "guidance": "[0, inf)",
}  # fmt: skip


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
        check_ranges("train", self, _LOOP_RANGES, keep_checkpoints="the newest checkpoint may be damaged")


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
        check_ranges("train", self, _TRAIN_RANGES, guidance="1 is no guidance")

"""Settings of a training run: those of every training loop, and those of diffusion training."""

from dataclasses import dataclass, field
from typing import Literal

from stdit.ranges import check_ranges

_LOOP_RANGES = {
    "steps": "[1, inf)", "decay_steps": "[1, inf)", "warmup_steps": "[0, inf)", "lr": "(0, inf)", "weight_decay": "[0, inf)",
    "clip_norm": "(0, inf)", "ema_decay": "[0, 1)", "checkpoint_every": "[1, inf)", "keep_checkpoints": "[2, inf)",
    "log_every": "[1, inf)", "preview_every": "[1, inf)", "max_skipped": "[1, inf)", "profile": "[0, inf)",
}  # fmt: skip
_TRAIN_RANGES = {
    "batch_size": "[1, inf)", "tokens": "[1, inf)", "micro_batch": "[1, inf)", "label_dropout": "[0, 1)", "samples": "[0, inf)",
    "sample_steps": "[1, inf)", "guidance": "[0, inf)", "history_noise": "[0, 1)", "holdout": "[0, 1)", "guide_step": "[1, inf)",
}  # fmt: skip


@dataclass
class LoopConfig:
    """Settings of the training loop, whatever it trains."""

    steps: int = 400_000  # optimizer steps
    decay_steps: int | None = None  # step at which the learning rate reaches zero; null: a constant rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how the rate falls until decay_steps
    warmup_steps: int = 0  # steps in which the rate rises from zero
    optimizer: Literal["adamw", "muon", "adamw8bit"] = (
        "adamw"  # muon: matrices by Muon, the rest by AdamW; adamw8bit: AdamW with moments of 8 bits (bitsandbytes)
    )
    lr: float = 1e-4  # learning rate
    weight_decay: float = 0.0  # decoupled weight decay
    clip_norm: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.9999  # decay of the averaged weights, which are exported
    average_lengths: list[float] = field(
        default_factory=list
    )  # lengths of two further averages, as shares of the training ([0.05,0.1]), for stdit average
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where the device has it, fp32, or auto
    resume: str = "auto"  # auto, never, or the path of a checkpoint or of a folder of them
    allow_changes: bool = False  # resume although the config differs
    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 2  # newest checkpoints kept, 2 or more
    log_every: int = 50  # steps between lines of the log
    preview_every: int = 5000  # steps between sampled previews
    profile: int = 0  # steps to trace by torch's profiler after three, into output/NAME/trace.json; 0: none
    max_skipped: int = 20  # steps in a row with a non-finite loss or gradient, after which a run stops
    trackers: list[str] | None = (
        None  # tensorboard, wandb, trackio, ...; null: tensorboard if it is installed; []: none
    )

    def __post_init__(self) -> None:
        check_ranges("train", self, _LOOP_RANGES, keep_checkpoints="the newest checkpoint may be damaged")
        if self.schedule == "cosine" and self.decay_steps is None:
            raise ValueError(
                f"train.schedule=cosine falls until train.decay_steps, which is not set; set it, for example to {self.steps}."
            )
        for length in self.average_lengths:
            if not 0 < length <= 0.288:
                raise ValueError(
                    f"train.average_lengths has {length}, which must be > 0 and <= 0.288; the usual pair is [0.05,0.1]."
                )
        if len(set(self.average_lengths)) < len(self.average_lengths):
            raise ValueError(
                f"train.average_lengths={self.average_lengths} has one length twice; the usual pair is [0.05,0.1]."
            )


@dataclass
class ParallelConfig:
    """How a model is spread over the processes of a run; without it every process has all of the model."""

    shard: Literal["none", "fsdp"] = "none"  # fsdp: weights, gradients, averages and optimizer in shards (FSDP2)
    replicas: int = 1  # fsdp: groups of processes that each hold the whole model between them (HSDP)
    context: int = 1  # processes that share the frames of every clip, for long ones; the rest is data parallel
    ring: int = (
        1  # of these, processes around which keys and values travel, for more of them than heads (ring attention)
    )
    gather_bf16: bool = False  # fsdp: gather weights in bfloat16: half the traffic, but norms have no float32 weights
    reshard: bool = True  # fsdp: give gathered weights back after the forward pass; false takes memory and saves time
    offload: bool = False  # fsdp, also of one process: weights, gradients, averages and optimizer in the host's memory
    timeout: float = 1800.0  # seconds after which a process that does not answer ends the run

    def __post_init__(self) -> None:
        check_ranges(
            "train.parallel",
            self,
            {"replicas": "[1, inf)", "context": "[1, inf)", "ring": "[1, inf)", "timeout": "(0, inf)"},
        )
        if self.replicas > 1 and self.shard == "none":
            raise ValueError(
                f"train.parallel.replicas={self.replicas} has no effect without train.parallel.shard=fsdp; set both."
            )
        if self.offload and self.shard == "none":
            raise ValueError(
                "train.parallel.offload=true has no effect without train.parallel.shard=fsdp, which moves blocks one by one, also "
                "with one process; set both."
            )
        if self.offload and not self.reshard:
            raise ValueError(
                "train.parallel.reshard=false keeps all weights on the device, which train.parallel.offload=true is to prevent; "
                "set one of them to its default."
            )
        if self.context % self.ring:
            fits = [n for n in range(1, self.context + 1) if self.context % n == 0]
            raise ValueError(
                f"train.parallel.ring={self.ring} does not divide train.parallel.context={self.context}; use one of "
                f"{', '.join(map(str, fits))}."
            )


@dataclass
class LoraConfig:
    """Matrices of low rank that are trained in place of the model's weights, which stay as they are (LoRA)."""

    rank: int | None = None  # their rank, such as 16; null: all weights are trained
    alpha: float | None = None  # their product is scaled by alpha / rank; null: the rank
    layers: str = r"blocks\..*\.(qkv|q|kv|proj|fc1|fc2)"  # regular expression of the linear layers that get them

    def __post_init__(self) -> None:
        check_ranges("train.lora", self, {"rank": "[1, inf)", "alpha": "(0, inf)"})
        if self.rank is None and (self.alpha is not None or self.layers != type(self).layers):
            raise ValueError(
                "train.lora.alpha and train.lora.layers have no effect without train.lora.rank; set it, too."
            )


@dataclass
class TrainConfig(LoopConfig):
    """Settings of diffusion training. `batch_size` counts clips per optimizer step over all processes."""

    batch_size: int = 256  # clips per optimizer step over all processes
    tokens: int | None = None  # with data.sizes, in place of batch_size: patches per step over all processes
    micro_batch: int | None = None  # clips at a time on one process; fewer take less memory; null: all
    guide_step: int | None = (
        None  # the averaged weights of this step, a weaker model, are kept to lead guidance away from
    )
    label_dropout: float = 0.1  # probability that a clip is trained without a condition, for guidance
    samples: int = 16  # clips sampled at the end
    sample_steps: int = 30  # solver steps of previews and samples
    history_noise: float = (
        0.0  # causal models: level at which streams of the exported model remember frames, against drift
    )
    guidance: float = 2.0  # guidance scale of previews and samples
    holdout: float = 0.0  # share of the files that are not trained on, and on which the loss is measured; 0: none
    holdout_column: str | None = (
        None  # hold out values of this column of the manifest, or of label, instead of single files
    )
    holdout_values: list[str] = field(default_factory=list)  # hold out these values of the column instead of a share
    compile: bool | Literal["auto"] = (
        False  # compile the blocks with torch.compile; the first steps take half a minute longer; auto: in long runs, if it works here
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # the model over several processes
    lora: LoraConfig = field(default_factory=LoraConfig)  # train a LoRA of the model at init_from.path
    previews: list[str] = field(
        default_factory=list
    )  # previews of your own, each as flags of stdit sample: ["--task animate --input photo.png"]; []: some clips of the data

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges("train", self, _TRAIN_RANGES, guidance="1 is no guidance", holdout="0 holds out nothing")
        if self.compile is True and self.parallel.context > 1:
            raise ValueError(
                f"train.compile=true is not there for shared frames (train.parallel.context={self.parallel.context}), which blocks "
                "exchange inside attention; set it to false."
            )
        if self.optimizer == "adamw8bit" and self.parallel.shard != "none":
            raise ValueError(
                f"train.optimizer=adamw8bit is not there for shards (train.parallel.shard={self.parallel.shard}), of which bitsandbytes "
                "knows nothing; set train.optimizer=adamw, or train.parallel.shard=none."
            )
        unfit = {"guide_step": self.guide_step, "average_lengths": self.average_lengths, "parallel.shard": self.parallel.shard != "none" and self.parallel.shard}  # fmt: skip
        if self.lora.rank is not None and any(unfit.values()):
            name = next(name for name, value in unfit.items() if value)
            off = {"guide_step": "null", "average_lengths": "[]", "parallel.shard": "none"}[name]
            raise ValueError(
                f"train.{name}={unfit[name]} is not there for a LoRA (train.lora.rank={self.lora.rank}); set train.{name}={off}."
            )
        if self.holdout_values and (self.holdout or self.holdout_column is None):
            raise ValueError(
                f"train.holdout_values={self.holdout_values} are values of train.holdout_column, in place of a share; set the "
                "column, and train.holdout=0."
            )
        if self.holdout_column is not None and not (self.holdout or self.holdout_values):
            raise ValueError(
                f"train.holdout_column={self.holdout_column!r} holds out nothing by itself; set train.holdout to a share of "
                "its values, or train.holdout_values."
            )

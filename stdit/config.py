"""The config of a training run: the defaults, overridden by a YAML file, overridden by the command line."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stdit.checkpoint.config import InitFrom
from stdit.data.config import DataConfig
from stdit.diffusion.config import ObjectiveConfig
from stdit.model.config import ModelConfig
from stdit.ranges import check_ranges, exact
from stdit.training.config import ParallelConfig, TrainConfig
from stdit.typed_config import config_folder, find_config, load_typed, to_plain
from stdit.variants import pick

__all__ = ["Config", "TextChoice", "VAEChoice", "config_folder", "find_config", "load_typed", "to_plain"]


# Keys of the objective that move the levels of flow, and the values at which they do not.
_STILL = {"shift": 1.0, "sampling_shift": None, "shift_tokens": 0}


@dataclass
class VAEChoice:
    """The VAE of a run."""

    name: str = "tiny"  # "tiny", a folder of diffusers weights, or a hub id


@dataclass
class TextChoice:
    """The text encoder of a run's captions, and the cache of their tokens."""

    encoder: str | None = None  # null: no captions; "words" (built in), or a folder or hub id of T5, umT5 or CLIP
    cache: str = "data/captions"  # folder in which the tokens of captions are cached


@dataclass
class Config:
    """The config of `stdit train`."""

    name: str = "run"  # name of the run, and of its folders in checkpoints/, models/ and output/
    seed: int = 0  # seed of weights, data, noise and dropout
    data: DataConfig = field(default_factory=DataConfig)  # clips, their size and how they are read
    vae: VAEChoice = field(default_factory=VAEChoice)  # the VAE whose latents are modelled
    text: TextChoice = field(default_factory=TextChoice)  # the text encoder of captions
    model: ModelConfig = field(default_factory=ModelConfig)  # the network
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)  # what is predicted, and at which noise levels
    init_from: InitFrom = field(default_factory=InitFrom)  # weights to start from
    train: TrainConfig = field(default_factory=TrainConfig)  # steps, optimizer, checkpoints, previews

    def __post_init__(self) -> None:
        check_ranges("", self, {"seed": "[0, 4294967295]"})  # what numpy's generators take
        if self.model.caption_channels is not None:
            raise ValueError(
                f"model.caption_channels={self.model.caption_channels} is decided by the text encoder; leave it out, and set "
                "text.encoder instead."
            )
        if self.model.caption_axes and self.text.encoder is None:
            raise ValueError(
                f"model.caption_axes={self.model.caption_axes} is for captions, but there is no text.encoder; set it, or leave "
                "model.caption_axes out."
            )
        objective = self.objective
        moved = [key for key, still in _STILL.items() if getattr(objective, key) != still]
        if objective.name == "ddpm" and moved:
            remedy = " ".join(f"objective.{key}={_STILL[key]}" for key in moved).replace("None", "null")
            raise ValueError(
                f"objective.{moved[0]}={getattr(objective, moved[0])} moves the levels of flow, but DDPM's are fixed by its betas; "
                f"set {remedy}, or objective.name=flow."
            )
        if objective.sampling_shift is not None and self.train.lora.rank is not None:
            raise ValueError(
                f"objective.sampling_shift={objective.sampling_shift} would be saved with a model, and a LoRA is sampled with the "
                "schedule of the one it changes; leave it out, and sample with --shift."
            )
        if objective.distilled_guidance != 1 and self.train.guidance != 1:
            raise ValueError(
                f"train.guidance={exact(self.train.guidance)} would guide samples of a model that has learnt "
                f"objective.distilled_guidance={exact(objective.distilled_guidance)}; set train.guidance=1."
            )
        # Samples are guided by auto where it is learnt.
        guider = "auto" if "auto" in objective.distilled_scales else "cfg"
        most = objective.distilled_scales.get(guider)
        if most is not None and not 1 <= self.train.guidance <= most:
            raise ValueError(
                f"train.guidance={exact(self.train.guidance)} is not among the scales that the model is to learn for the guider {guider} "
                f"(objective.distilled_scales), 1 to {exact(most)}; choose one of them."
            )
        longest = max((size[0] for size in self.data.sizes), default=0)
        if self.model.sink and longest > self.data.num_frames:
            raise ValueError(
                f"model.sink={self.model.sink} counts from data.num_frames={self.data.num_frames}, but data.sizes has "
                f"clips of {longest} frames; set data.num_frames={longest}."
            )
        if self.model.actions and self.data.packing:
            raise ValueError(
                "model.actions=true is for batches of one shape: packed clips take conditions of whole clips; set data.packing=false."
            )
        self._check_start()
        self._check_capabilities()

    def _check_start(self) -> None:
        """Raise ValueError for a LoRA or a guided teacher without the model that it needs."""
        start, lora = self.init_from, self.train.lora
        if "guidance" in self.model.extra_conditions:
            raise ValueError(
                "model.extra_conditions.guidance is what objective.distilled_scales turns on; set that, and leave this one out."
            )
        if self.objective.distilled_scales and start.path is None:
            raise ValueError(
                "objective.distilled_scales needs a teacher, whose guidance is learnt; set init_from.path to a trained model."
            )
        if self.objective.distilled_guider == "auto" and start.path is None:
            raise ValueError(
                "objective.distilled_guider=auto needs a teacher with a guide; set init_from.path to a model that was trained with "
                "train.guide_step, or objective.distilled_guider=cfg."
            )
        if lora.rank is None:
            return
        if start.path is None:
            raise ValueError(
                f"train.lora.rank={lora.rank} trains a LoRA of a model, but there is none; set init_from.path to its folder."
            )
        if start != InitFrom(path=start.path) or self.model.network == "unet":
            raise ValueError(
                "a LoRA is for the model of init_from.path as it is; leave out the other keys of init_from, and model.network=unet."
            )

    def _check_capabilities(self) -> None:
        """Raise ValueError if the data or the objective need a capability that the model lacks."""
        # Imported on use, since the schema must be readable without torch.
        from stdit.diffusion.masks import MASK_STRATEGIES
        from stdit.model.capabilities import check_supported, supported
        from stdit.model.trunks import TRUNKS
        from stdit.nn.conditioning import CONDITIONINGS

        model = self.model
        pick(CONDITIONINGS, model.conditioning, "model.conditioning")
        trunk = pick(TRUNKS, model.trunk, "model.trunk")
        text = self.text.encoder is not None
        if "text" in trunk.requires and not text:
            raise ValueError(
                f"model.trunk={model.trunk} needs captions; set text.encoder=words (or a folder of T5), or model.trunk=stack."
            )
        if self.objective.mask_ratio and set(self.objective.active_mask_probs) - {"shared", "per_frame"}:
            raise ValueError(
                "objective.mask_ratio hides patches, but known frames must be visible; set objective.mask_strategy=shared, or "
                "objective.mask_ratio=0."
            )
        if model.gradient_checkpointing == "selective" and self.train.compile is True:
            raise ValueError(
                "model.gradient_checkpointing=selective does not see inside compiled blocks (train.compile=true), which choose for "
                "themselves what to keep; use true or false."
            )
        what = f"model.trunk={model.trunk} with model.conditioning={model.conditioning}"
        supports = supported(model.trunk, model.conditioning, causal=model.causal, text=text)
        if model.network == "unet":
            what, supports = "model.network=unet", frozenset()
        strategies = {name: MASK_STRATEGIES[name] for name in self.objective.active_mask_probs}
        check_supported(list(self._needs(strategies)), supports, what)
        if model.network == "unet":
            self._check_unet()

    def _needs(self, strategies: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the capabilities that the data and the objective need of the model."""
        from stdit.model.capabilities import Need, trunks_that_support

        objective = self.objective
        for name, strategy in strategies.items():
            key = (
                f"objective.mask_strategy={name}" if objective.mask_strategy == name else f"objective.mask_probs.{name}"
            )
            off = (
                "objective.mask_strategy=shared"
                if objective.mask_strategy == name
                else f"objective.mask_probs.{name}=0"
            )
            if strategy.per_patch:
                yield Need("patch_levels", key, f"set {off}, or model.trunk=stack and model.conditioning=adaln_zero")
            if strategy.teacher_forcing:
                yield Need("causal", key, "set model.causal=true, or objective.mask_strategy=prefix")
            if name != "shared":
                yield Need("frame_levels", key, "set objective.mask_strategy=shared, or model.network=transformer")
        if objective.mask_ratio:
            choice = f"objective.mask_ratio={objective.mask_ratio}"
            yield Need("masking", choice, "set model.trunk=masked, or objective.mask_ratio=0")
        if objective.route_ratio:
            choice = f"objective.route_ratio={objective.route_ratio}"
            yield Need(
                "routing",
                choice,
                "set model.network=transformer and model.trunk=stack with another model.conditioning than in_context, or "
                "objective.route_ratio=0",
            )
            for key, sharing in (
                (f"model.depth={self.model.depth}", self.model.depth is not None and self.model.depth < 3),
                ("data.packing=true", self.data.packing),
                (f"train.parallel.context={self.train.parallel.context}", self.train.parallel.context > 1),
            ):
                if sharing:
                    raise ValueError(
                        f"{choice} takes whole clips of one shape and blocks in the middle, which {key} does not have; set it to 0, or leave out {key}."
                    )
        if self.data.packing:
            remedy = (
                f"set data.packing=false, or model.trunk to one of {', '.join(trunks_that_support('packing'))}, with "
                "model.conditioning=adaln_zero, model.causal=false and no text.encoder"
            )
            yield Need("packing", "data.packing=true", remedy)
            if any(strategy.per_patch for strategy in strategies.values()):
                raise ValueError(
                    "data.packing=true takes noise levels per frame, but mask strategy region has levels per patch; set "
                    "objective.mask_probs.region=0."
                )

    def _check_unet(self) -> None:
        """Raise ValueError for settings that only a transformer supports."""
        plain = ModelConfig()
        keys = (
            "causal",
            "sink",
            "trunk",
            "conditioning",
            "micro_conditions",
            "gradient_checkpointing",
            "extra_conditions",
            "label_std",
        )
        chosen = [
            f"model.{key}={getattr(self.model, key)}" for key in keys if getattr(self.model, key) != getattr(plain, key)
        ]
        if self.train.compile is True or self.train.parallel != ParallelConfig():
            raise ValueError(
                "model.network=unet is neither compiled nor spread over processes; leave out train.compile and train.parallel."
            )
        if chosen or self.init_from.path:
            raise ValueError(
                "model.network=unet has one noise level for all frames, a structure and conditioning of its own, and starts "
                f"from scratch; use no init_from and none of {', '.join(chosen) or 'model.micro_conditions'}, or "
                "model.network=transformer."
            )

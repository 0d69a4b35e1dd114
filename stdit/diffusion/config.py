"""The training objective's section of a config."""

from dataclasses import dataclass, field
from typing import Literal

from stdit.ranges import check_ranges, exact

Distribution = Literal["logit_normal", "uniform"]
Betas = Literal["linear", "scaled_linear"]

# Seven clips in eight have no known frames, which costs little quality in generating whole clips (dev/LOG.md).
DEFAULT_MASK_PROBS = {
    "shared": 0.875, "prefix": 0.04, "motion": 0.015, "suffix": 0.025, "ends": 0.02, "region": 0.015, "every_kth": 0.005,
    "per_frame": 0.0025, "random": 0.0025,
}  # fmt: skip

_RANGES = {
    "mask_warmup_steps": "[0, inf)", "cond_noise_max": "[0, 1)", "cond_clean_frames": "[0, inf)", "cond_timestep_shift": "(0, inf)", "mask_ratio": "[0, 0.75]", "route_ratio": "[0, 0.9]",
    "shift": "(0, inf)", "sampling_shift": "(0, inf)", "shift_tokens": "[0, inf)", "distilled_guidance": "[1, inf)",
}  # fmt: skip


@dataclass
class ObjectiveConfig:
    """The training objective: what the network predicts, which frames are known, how noise levels are drawn."""

    name: Literal["flow", "ddpm"] = "flow"  # flow: rectified flow; ddpm: DDPM as in DiT
    mask_strategy: str = "shared"  # which frames are known in training; mixed: each clip draws a strategy by mask_probs
    mask_probs: dict[str, float] = field(
        default_factory=lambda: dict(DEFAULT_MASK_PROBS)
    )  # mixed: probability of each strategy
    mask_warmup_steps: int = 0  # mixed: before this step no frame is known
    cond_noise_max: float = 0.0  # known frames get a random noise level up to this (conditioning augmentation)
    cond_clean_frames: int = (
        0  # teacher forcing: so many first frames get no such noise, as the frames of model.sink in sampling
    )
    cond_timestep_shift: float = 1.0  # flow: additional shift toward noise for clips with known frames
    mask_ratio: float = 0.0  # trunk=masked: share of patches hidden from the encoder in a second pass (MDT v2: 0.3)
    route_ratio: float = 0.0  # trunk=stack: share of patches that skip the middle blocks in training (TREAD: 0.5)
    betas: Betas = "linear"  # ddpm: linear (DiT), or scaled_linear (Stable Diffusion, U-ViT)
    learn_sigma: bool = True  # ddpm: the network also predicts the variance
    distribution: Distribution = "logit_normal"  # flow: distribution of levels in training
    shift: float = 1.0  # flow: shifts levels toward noise, in training and sampling
    sampling_shift: float | None = (
        None  # flow: another shift in sampling, and where steps of a flow map end; null: shift
    )
    flow_map: bool = False  # flow: the network also learns where steps end, for sampling in few of them
    distilled_guidance: float = 1.0  # flow_map: guidance scale that is learnt into the network; 1: none
    distilled_guider: Literal["cfg", "auto"] = (
        "cfg"  # what the teacher's guidance leads away from: no condition, or its guide
    )
    distilled_scales: dict[str, float] = field(
        default_factory=dict
    )  # flow_map: in place of one scale all from 1 to this, as a condition, by guider: {cfg: 5, auto: 3}; 1: not this guider
    shift_tokens: int = 0  # flow: latent positions at which shift holds; it scales with the root of the size; 0: off

    def __post_init__(self) -> None:
        unchanged = "1 leaves the levels as they are"
        check_ranges(
            "objective", self, _RANGES, shift=unchanged, sampling_shift="null: that of training", cond_timestep_shift=unchanged, mask_ratio="MDT v2 uses 0.3",
            cond_noise_max="0 keeps known frames clean", route_ratio="TREAD uses 0.5",
        )  # fmt: skip
        for key, plain in (("name", "flow"), ("mask_ratio", 0), ("route_ratio", 0)):
            if self.flow_map and getattr(self, key) != plain:
                raise ValueError(
                    f"objective.flow_map=true does not go with objective.{key}={getattr(self, key)}; use {key}={plain}, or "
                    "flow_map=false."
                )
        if self.distilled_guidance != 1 and not self.flow_map:
            raise ValueError(
                f"objective.distilled_guidance={self.distilled_guidance} has no effect without objective.flow_map=true; set both."
            )
        if self.distilled_guider != "cfg" and not self.flow_map:
            raise ValueError(
                f"objective.distilled_guider={self.distilled_guider} has no effect without objective.flow_map=true; set both."
            )
        self._check_scales()
        for name in self.mask_probs:
            _check_strategy(name, "strategy in objective.mask_probs")
        for name, probability in self.mask_probs.items():
            if not 0 <= probability < float("inf"):
                raise ValueError(f"objective.mask_probs.{name} must be >= 0 and finite, got {probability}; 0: never.")
        _check_strategy(self.mask_strategy, "objective.mask_strategy", mixed=True)
        if not any(self.mask_probs.values()):
            raise ValueError("objective.mask_probs are all 0; give at least one strategy a probability.")
        if "teacher_forcing" in self.active_mask_probs and len(self.active_mask_probs) > 1:
            raise ValueError(
                "objective.mask_probs.teacher_forcing gives every clip a noised history and mixes with no other strategy; "
                "set it to 0, or use objective.mask_strategy=teacher_forcing."
            )

    def _check_scales(self) -> None:
        # One that a config names can be left out: an override adds to its mapping.
        self.distilled_scales = {name: scale for name, scale in self.distilled_scales.items() if scale != 1}
        for name, scale in self.distilled_scales.items():
            if name not in ("cfg", "auto") or not 1 < scale < float("inf"):
                raise ValueError(
                    f"objective.distilled_scales={self.distilled_scales} must have the largest scale, above 1, of the guider cfg or "
                    f"auto, got {name}: {scale}; 1 leaves a guider out."
                )
        other = (
            f"flow_map={str(self.flow_map).lower()}" if not self.flow_map
            else f"distilled_guidance={exact(self.distilled_guidance)}" if self.distilled_guidance != 1
            else f"distilled_guider={self.distilled_guider}" if self.distilled_guider != "cfg" else None
        )  # fmt: skip
        if self.distilled_scales and other is not None:
            raise ValueError(
                f"objective.distilled_scales does not go with objective.{other}; a flow map learns either one scale, or all up to "
                "a largest one; objective.distilled_scales={cfg: 1, auto: 1} learns none by this key."
            )

    @property
    def active_mask_probs(self) -> dict[str, float]:
        """Strategies that training draws from, with their probabilities, which sum to 1."""
        if self.mask_strategy != "mixed":
            return {self.mask_strategy: 1.0}
        total = sum(self.mask_probs.values())
        return {name: probability / total for name, probability in self.mask_probs.items() if probability}

    def mask_probs_at(self, step: int) -> dict[str, float]:
        """Strategies that the clips of one training step draw from, with their probabilities."""
        warming_up = self.mask_strategy == "mixed" and step < self.mask_warmup_steps
        return {"shared": 1.0} if warming_up else self.active_mask_probs


def _check_strategy(name: str, what: str, mixed: bool = False) -> None:
    from stdit.diffusion.masks import MASK_STRATEGIES  # imported on use, so that this module needs no torch
    from stdit.variants import pick

    pick({**MASK_STRATEGIES, **({"mixed": None} if mixed else {})}, name, what)

"""The config of a training run, composed of its parts. Defaults <- YAML file <- command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stdit.checkpoint.inflate import InitFrom
from stdit.data.datasets import DataConfig
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.diffusion.objective import ObjectiveConfig
from stdit.legacy import renamed_config
from stdit.model.config import ModelConfig
from stdit.model.trunks import TRUNKS
from stdit.nn.conditioning import CONDITIONINGS
from stdit.training.config import TrainConfig
from stdit.variants import pick

T = TypeVar("T")


@dataclass
class VAEChoice:
    """`name`: "tiny", a folder of diffusers weights, or a hub id."""

    name: str = "tiny"


@dataclass
class TextChoice:
    """`encoder`: null for no captions, "words" (built in), or a folder or hub id of T5, umT5 or CLIP; `cache`: where tokens are kept."""

    encoder: str | None = None
    cache: str = "data/captions"


@dataclass
class Config:
    """The config of `stdit train`."""

    name: str = "run"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    vae: VAEChoice = field(default_factory=VAEChoice)
    text: TextChoice = field(default_factory=TextChoice)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    init_from: InitFrom = field(default_factory=InitFrom)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model.caption_channels is not None:
            raise ValueError(
                "model.caption_channels is the text encoder's; leave it out, and name the encoder by text.encoder."
            )
        objective = self.objective
        if objective.name == "ddpm" and (objective.shift, objective.shift_tokens) != (1.0, 0):
            raise ValueError(
                f"objective.shift={objective.shift} and shift_tokens={objective.shift_tokens} move flow's levels; DDPM's are "
                "fixed by its betas: set objective.shift=1 and shift_tokens=0, or objective.name=flow."
            )
        by_tokens = pick(CONDITIONINGS, self.model.conditioning, "model.conditioning").by_tokens
        if by_tokens and "region" in self.objective.active_mask_probs:
            raise ValueError(
                f"model.conditioning={self.model.conditioning} has one level a frame, objective.mask_probs.region one a patch; "
                "set objective.mask_probs.region=0, or model.conditioning=adaln_zero."
            )
        trunk = pick(TRUNKS, self.model.trunk, "model.trunk")
        if not trunk.supports_patch_levels and "region" in self.objective.active_mask_probs:
            raise ValueError(
                f"model.trunk={self.model.trunk} takes levels by frame; set objective.mask_probs.region=0."
            )
        if self.data.packing and not trunk.packs:
            packs = [name for name, kind in TRUNKS.items() if kind.packs]
            raise ValueError(
                f"model.trunk={self.model.trunk} does not take clips of many shapes in one row; set data.packing=false, or "
                f"model.trunk to one of {', '.join(packs)}."
            )
        if self.data.packing and (by_tokens or self.text.encoder is not None):
            raise ValueError(
                "data.packing=true takes conditions that are vectors; use model.conditioning=adaln_zero without "
                "text.encoder, or data.packing=false."
            )
        if trunk.requires_text and self.text.encoder is None:
            raise ValueError(
                f"model.trunk={self.model.trunk} has a stream of text; set text.encoder=words (or a folder of T5), or model.trunk=stack."
            )
        if self.objective.mask_ratio and not trunk.hides:
            raise ValueError(
                f"objective.mask_ratio={self.objective.mask_ratio} hides patches from the encoder of model.trunk=masked; set "
                "that, or objective.mask_ratio=0."
            )
        if self.objective.mask_ratio and set(self.objective.active_mask_probs) - {"shared", "per_frame"}:
            raise ValueError(
                "objective.mask_ratio hides patches, known frames must be seen; set objective.mask_strategy=shared, or "
                "objective.mask_ratio=0."
            )
        if self.model.network == "unet":
            other = set(self.objective.active_mask_probs) - {"shared"}
            plain = ModelConfig()
            chosen = [
                f"model.{key}={getattr(self.model, key)}"
                for key in ("causal", "sink", "trunk", "conditioning", "micro_conditions", "gradient_checkpointing")
                if getattr(self.model, key) != getattr(plain, key)
            ]
            if other or chosen or self.data.packing or self.init_from.path:
                raise ValueError(
                    "model.network=unet has one noise level for all frames, wiring and conditioning of its own, and starts "
                    "afresh; use objective.mask_strategy=shared, data.packing=false, no init_from and none of "
                    f"{', '.join(chosen) or 'model.micro_conditions'}, or model.network=transformer."
                )
        longest = max((size[0] for size in self.data.sizes), default=0)
        if self.model.sink and longest > self.data.num_frames:
            raise ValueError(
                f"model.sink={self.model.sink} counts from data.num_frames={self.data.num_frames}, and data.sizes has "
                f"{longest}; set data.num_frames={longest}."
            )
        taught = [name for name in self.objective.active_mask_probs if MASK_STRATEGIES[name].teacher_forcing]
        if taught and not self.model.causal:
            raise ValueError(
                f"objective.mask_strategy={taught[0]} shows each frame the clean ones before it, which is for model.causal=true; "
                "set that, or use objective.mask_strategy=prefix."
            )


def config_folder() -> Path:
    """Where the package's configs are: in the wheel stdit/configs, in a checkout the folder configs/ of the repository."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[1] / "configs"


def find_config(name: str | Path, subfolder: str = "") -> Path:
    """The file of a config: a path; or a name in the package with or without "configs/" and ".yaml", such as "quickstart".

    subfolder: of the package's configs, searched first. ValueError with what there is, if there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    folder, bare = config_folder(), str(name).removeprefix("configs/").removesuffix(".yaml")
    for root in (folder / subfolder, folder):
        found = root / f"{bare}.yaml"
        if found.is_file() and found.resolve().is_relative_to(folder.resolve()):  # a name, no way out of the folder
            return found
    here = [str(path) for path in sorted(Path("configs").glob("*.yaml"))]
    packaged = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))
    raise ValueError(
        f"The config {str(name)!r} does not exist; there are: {', '.join(here) or 'none in configs/'}; "
        f"by name: {', '.join(packaged) or 'none'}."
    )


def load_typed(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a config (see `find_config`) and `key=value` overrides into the dataclass `schema`.

    Raises ValueError in one line: the key, what was expected, the nearest name.
    """
    path = find_config(path)
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ValueError(f"{override!r} is no override; write key=value, for example train.steps=1000.")
    try:
        given = OmegaConf.load(path)
        if not isinstance(given, DictConfig):
            raise ValueError(f"The config {str(path)!r} is not a mapping of keys to values; see configs/ for examples.")
        sources = [given, OmegaConf.from_dotlist(list(overrides))]
        for source in sources:
            _refuse_interpolation(source, "")
        renamed = [renamed_config(OmegaConf.to_container(source)) for source in sources]  # type: ignore[arg-type]
        merged = OmegaConf.merge(OmegaConf.structured(schema), *renamed)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from error
    except OSError as error:
        raise ValueError(f"The config {str(path)!r} cannot be read: {error}.") from error
    except ValueError:
        raise
    except Exception as error:  # PyYAML's own
        raise ValueError(f"The config {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error


def _refuse_interpolation(node: Any, key: str) -> None:
    """A config is data: `${...}` could read the environment."""
    if isinstance(node, DictConfig):
        for name in node:
            if OmegaConf.is_interpolation(node, name):
                raise ValueError(
                    f"{key}{name} holds an interpolation (${{...}}), which configs may not; write the value."
                )
            _refuse_interpolation(node._get_node(name), f"{key}{name}.")


def to_plain(config: Any) -> dict:
    """A config as plain dictionaries and numbers."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]

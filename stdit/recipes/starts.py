"""What the model that a run starts from was trained with, compared with what the run asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stdit.config import Config
from stdit.files import read_json
from stdit.model.stdit import STDiT
from stdit.ranges import exact
from stdit.vae import VideoVAE


def index_of(path: str | None) -> dict[str, Any]:
    """The model_index.json of a pipeline that a model's folder is, or lies in; {} without one."""
    return read_json(_pipeline_of(path) / "model_index.json")


def _pipeline_of(path: str | None) -> Path:
    """The folder of a pipeline that a model's folder is, or lies in; without one the model's own."""
    folder = Path(path or "")
    return next((one for one in (folder, folder.parent) if (one / "model_index.json").is_file()), folder)


def check_vae(config: Config, model: STDiT, vae: VideoVAE) -> None:
    """Raise ValueError unless the latents of a VAE are those that the model of `init_from.path` was trained on."""
    path = config.init_from.path
    if model.config.in_channels != vae.channels:
        raise ValueError(
            f"the model of init_from.path={path!r} takes latents of {model.config.in_channels} channels, but vae.name="
            f"{config.vae.name!r} makes {vae.channels}; set vae.name to the VAE that it was trained with."
        )
    recorded = index_of(path).get("vae_fingerprint")
    if recorded is not None and not vae.has_fingerprint(recorded):
        folder = _pipeline_of(path)
        own = f"{str(folder / 'vae')!r}, or to " if (folder / "vae").is_dir() else ""
        missing = "" if own else f", which is not in {str(folder)!r}"
        raise ValueError(
            f"vae.name={config.vae.name!r} has other weights than the VAE of init_from.path={path!r}; set vae.name to "
            f"{own}the VAE that it was trained with{missing}."
        )


def check_objective(config: Config, trained: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ValueError unless keys of `objective` that the model of `init_from.path` was `trained` with are those `asked`."""
    for key, value in trained.items():
        if asked[key] != value:
            raise ValueError(
                f"objective.{key}={_plain(asked[key])}, but the model of init_from.path={config.init_from.path!r} was trained with "
                f"{_plain(value)}; set objective.{key}={_plain(value)}."
            )


def check_teacher(config: Config, model: STDiT, vae: VideoVAE) -> None:
    """Raise ValueError if a flow map cannot learn from the model of `init_from.path`, or, as a flow map, learn on."""
    path, trained_with = config.init_from.path, index_of(config.init_from.path).get("objective", "flow")
    if trained_with != "flow" or model.config.learn_sigma:
        raise ValueError(
            f"init_from.path={path!r} was trained with ddpm, whose output is no velocity, so that no flow map can learn from it; give "
            "a model that was trained with objective.name=flow."
        )
    check_vae(config, model, vae)
    if model.config.flow_map and model.config.distilled_guidance != 1:
        asked = {"distilled_guidance": config.objective.distilled_guidance}
        check_objective(config, {"distilled_guidance": model.config.distilled_guidance}, asked)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else exact(value) if isinstance(value, float) else str(value)

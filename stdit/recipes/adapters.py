"""LoRAs in training and sampling: the model that one is trained for, and those that a command adds to a model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stdit.config import Config
from stdit.data.datasets import Dataset
from stdit.data.joint import JointDataset
from stdit.data.rates import clip_rate
from stdit.diffusion.objective import Objective
from stdit.files import printable
from stdit.hub import LORA_FILE
from stdit.model.config import ModelConfig, model_arguments
from stdit.model.lora import load_lora, split_strength
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.nn.checkpointing import CHECKPOINTING
from stdit.recipes.models import load_adapted
from stdit.recipes.starts import check_objective, check_vae, index_of
from stdit.sampling.pipeline import STDiTPipeline
from stdit.vae import VideoVAE
from stdit.warn import warn_user


def build_adapted(config: Config, vae: VideoVAE, dataset: Dataset, objective: Objective) -> tuple[STDiT, Dataset]:
    """The model of `init_from.path` with a new LoRA, and the dataset with the labels of that model.

    ValueError if data, VAE or objective are not those of the model, which a LoRA cannot change.
    """
    model = load_adapted(config)
    _check_base(config, model, vae, objective)
    _compare_clips(config, clip_rate(config.data, dataset))
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing(CHECKPOINTING[config.model.gradient_checkpointing])
    if differing := _overruled(config.model, model):
        print(f"the network is that of {config.init_from.path}; {', '.join(differing)} of the config do not count")
    return model, _with_classes_of(model, dataset)


def _compare_clips(config: Config, rate: float) -> None:
    """Warn if clips of a LoRA have another length, size or rate than those that its model was trained with."""
    index = index_of(config.init_from.path)
    clips = {**{name: getattr(config.data, name) for name in ("num_frames", "height", "width")}, "fps": rate}
    if differing := [f"data.{name}={index[name]:g}" for name in clips if index.get(name) not in (None, clips[name])]:
        warn_user(
            f"the clips differ in length, size or rate from those of init_from.path={config.init_from.path!r}, so sizes and speeds "
            f"are learnt anew; as in its training: {' '.join(differing)}."
        )


def _check_base(config: Config, model: STDiT, vae: VideoVAE, objective: Objective) -> None:
    path, base = config.init_from.path, model.config
    check_vae(config, model, vae)
    if config.objective.route_ratio and "routing" not in model.supports:
        raise ValueError(
            f"objective.route_ratio={config.objective.route_ratio} needs patches that skip the middle blocks, which the model of "
            f"init_from.path={path!r} (trunk={base.trunk}, conditioning={base.conditioning}) does not support; set it to 0."
        )
    trained = {
        "name": index_of(path).get("objective", config.objective.name), "flow_map": base.flow_map,
        "learn_sigma": base.learn_sigma, "distilled_guidance": base.distilled_guidance,
    }  # fmt: skip
    asked = {
        "name": config.objective.name, "flow_map": config.objective.flow_map, "learn_sigma": objective.learns_sigma,
        "distilled_guidance": config.objective.distilled_guidance,
    }  # fmt: skip
    check_objective(config, trained, asked)


def check_adapted_captions(config: Config, model: STDiT, caption_channels: int | None) -> None:
    """Raise ValueError if captions are not those that the model of a LoRA takes."""
    path, base = config.init_from.path, model.config
    if base.caption_channels != caption_channels:
        encoder = index_of(path).get("text_encoder") or "the one that it was trained with"
        needs = f"captions of {base.caption_channels} channels" if base.caption_channels else "no captions"
        given = f"gives {caption_channels} channels" if caption_channels else "is null"
        raise ValueError(
            f"the model of init_from.path={path!r} takes {needs}, but text.encoder {given}; set text.encoder to "
            f"{printable(encoder) if base.caption_channels else 'null'}."
        )


def _overruled(config: ModelConfig, model: STDiT) -> list[str]:
    """Keys of `model` that the config sets and the network does not have."""
    plain, own = asdict(ModelConfig()), asdict(config)
    arguments = model_arguments(config)
    changed = [key for key, value in own.items() if value != plain[key]]
    return [
        f"model.{key}"
        for key in changed
        if key in model.config and key in arguments and _listed(arguments[key]) != _listed(model.config[key])
    ]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _with_classes_of(model: STDiT, dataset: Dataset) -> Dataset:
    """The dataset with the class numbers of a model, to which names of classes belong."""
    base = model.config
    if not base.num_classes:
        return dataset
    if not dataset.num_classes:
        raise ValueError(
            f"the model has {base.num_classes} classes, but the data has no labels; give folders by class, or a manifest with "
            "labels."
        )
    if dataset.class_names is None and dataset.num_classes > base.num_classes:
        raise ValueError(
            f"the data has labels up to {dataset.num_classes - 1}, but the model has {base.num_classes} classes, and a LoRA adds "
            "none; use labels of the model."
        )
    joint = isinstance(dataset, JointDataset)
    datasets, names = (dataset.datasets, dataset.names) if joint else ([dataset], ["the data"])  # type: ignore[attr-defined]
    try:
        return JointDataset(datasets, names, base.class_names, num_classes=base.num_classes)
    except ValueError as error:
        raise ValueError(f"{error} A LoRA adds no classes to the model of init_from.path.") from error


def add_loras(pipe: STDiTPipeline, given: Sequence[str]) -> None:
    """Add LoRAs, PATH or PATH:SCALE each, to the model of a pipeline and to its guide, which is of the same kind.

    ValueError for one that is no LoRA of this model.
    """
    for text in given:
        path, strength = split_strength(text)
        if (Path(path) / "model_index.json").is_file() and not (Path(path) / LORA_FILE).is_file():
            raise ValueError(f"--lora {path}: that is a model, no LoRA; give it as the model, or the folder of a LoRA.")
        for model in filter(None, (pipe.transformer, pipe.guide)):
            if isinstance(model, UNet):
                raise ValueError(f"--lora {path}: the model is a U-Net, for which stdit has no LoRAs; leave it out.")
            load_lora(model, path, strength, compare=model is pipe.transformer)

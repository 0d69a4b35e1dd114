"""Find and load the trained model of a command: a named folder, a run's checkpoint or the newest model, on the available device."""

import sys
from collections import ChainMap
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stdit.config import Config
from stdit.hub import LORA_FILE, check_reachable, resolve_source
from stdit.legacy import renamed_config
from stdit.model.lora import base_fingerprint
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.nn.low_rank import add_lora
from stdit.recipes.info import CHECKPOINTS
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.loop_state import load_weights
from stdit.training.results import LORA, build_pipeline
from stdit.training.state import Checkpoint, damage, list_checkpoints, load_checkpoint, read_checkpoint
from stdit.vae import load_vae
from stdit.warn import warn_user


def default_device() -> str:
    """The accelerator of this machine ("cuda", "mps", ...), or "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def load_pipeline(model: str | Path) -> STDiTPipeline:
    """The pipeline in a folder, on `default_device`.

    A folder of checkpoints, and the name of a run under models/ that has only checkpoints, give the averaged weights of
    the newest one, with a note on stderr.
    """
    run = checkpoint_folder(Path(model))
    if (Path(model) / LORA_FILE).is_file():
        raise ValueError(f"{model} is a LoRA; give its model as --model, and --lora {model}.")
    if run is None:
        _note_newer_checkpoint(Path(model))
        diffusers_logging.disable_progress_bar()  # of three small parts, which would fill logs
        try:
            return STDiTPipeline.from_pretrained(str(model)).to(default_device())
        finally:
            diffusers_logging.enable_progress_bar()
    checkpoint = find_checkpoint(run)
    name = checkpoint.path.parent.name
    print(
        f"{model}: sampled from {checkpoint.path}, its averaged weights; stdit export {name} writes them to "
        f"models/{name}.",
        file=sys.stderr,
    )
    return pipeline_of(checkpoint).to(default_device())


def _note_newer_checkpoint(model: Path) -> None:
    """Say, on stderr, that a run went on after its model was exported."""
    newest, exported = list_checkpoints(CHECKPOINTS / model.name)[:1], model / "model_index.json"
    if model.parent == Path("models") and newest and exported.is_file():
        info = newest[0] / "info.json"
        if info.is_file() and info.stat().st_mtime > exported.stat().st_mtime:
            print(f"{newest[0]} is newer than {model}; stdit export {model.name} writes it there.", file=sys.stderr)


def checkpoint_folder(model: Path) -> Path | None:
    """The folder of a run's checkpoints, or of one of them, that a name of a model means; None if it means neither."""
    if _is_checkpoint(model) or list_checkpoints(model):
        return model
    run = CHECKPOINTS / model.name
    return run if not model.exists() and model.parent == Path("models") and list_checkpoints(run) else None


def find_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder step-N, or the newest undamaged one of a run; ValueError if there is none."""
    if _is_checkpoint(folder):
        if reason := damage(folder):
            raise ValueError(f"{folder} is damaged ({reason}); give {folder.parent}, which finds the newest whole one.")
        return read_checkpoint(folder)
    found = load_checkpoint(folder)
    if found is None:
        raise ValueError(f"{str(folder)!r} has no checkpoint (step-N); give a folder that training wrote.")
    return found


def load_start(path: str, key: str = "init_from.path") -> STDiT:
    """The model of a folder or hub id that `key` names; ValueError at once, without asking the hub in vain, if there is none."""
    source, options = resolve_source(path, key)
    if is_local := Path(source).is_dir():
        check_is_model(Path(source), key)
    try:
        check_reachable(source, "config.json", options)
        model = STDiT.from_pretrained(source, **options)
    except OSError as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{key}={path!r} cannot be loaded: {said}; copy or export the model again."
            if is_local
            else f"{key}={path!r} is no folder, and as a hub id it cannot be read: {said}; give the folder of a model."
        ) from error
    if key == "init_from.path" and "guidance" in model.conditioners:
        raise ValueError(
            f"{key}={path!r} has learnt scales of guidance (objective.distilled_scales), which further training would not keep; "
            "train the model that was its teacher."
        )
    return model


def check_is_model(folder: Path, key: str) -> None:
    """Raise ValueError for a folder that is that of a LoRA, or of anything else than a model."""
    if (folder / LORA_FILE).is_file():
        raise ValueError(
            f"{key}={str(folder)!r} is a LoRA; give its model, or write both in one: stdit export MODEL --lora {folder} --output "
            "models/merged."
        )
    if not any((folder / name).is_file() for name in ("config.json", "model_index.json", "transformer/config.json")):
        raise ValueError(
            f"{key}={str(folder)!r} holds no model (no config.json); stdit info lists those under models/."
        )


def load_adapted(config: Config) -> STDiT:
    """The model of `init_from.path`, whose weights stay as they are, with a new LoRA that is trained."""
    lora = config.train.lora
    assert config.init_from.path is not None and lora.rank is not None
    model = load_start(config.init_from.path).requires_grad_(False)
    add_lora(model, LORA, rank=lora.rank, alpha=lora.alpha, layers=lora.layers, seed=config.seed)
    return model


def config_of(checkpoint: Checkpoint) -> Config:
    """The config of the run that wrote a checkpoint."""
    info, path = checkpoint.info, checkpoint.path
    settings = {key: value for key, value in info["config"].items() if not key.endswith("_fingerprint")}
    saved = renamed_config(settings)
    if "objective" not in saved:
        if "short_sides" in saved.get("data", {}):
            raise ValueError(
                f"{path} is no checkpoint of stdit train, but of stdit train-vae; give a run of the former."
            )
        raise ValueError(
            f"the config in {path / 'info.json'} has no section objective, without which its model cannot be sampled; give another "
            "checkpoint of the run, or restore this one."
        )
    # Earlier versions took what training refuses by now: a length twice, and a scale that previews refused.
    trained = dict(saved.get("train", {}))
    trained["average_lengths"] = [*dict.fromkeys(trained.get("average_lengths", []))]
    if saved["objective"].get("distilled_guidance", 1.0) != 1:
        trained["guidance"] = 1.0
    saved = {**saved, "train": trained}
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: its config cannot be read: {str(error).splitlines()[0]}.") from error
    assert isinstance(config, Config)
    return config


def pipeline_of(checkpoint: Checkpoint) -> STDiTPipeline:
    """The pipeline of a checkpoint's averaged weights; ValueError for a checkpoint of before version 0.2."""
    config, info, path = config_of(checkpoint), checkpoint.info, checkpoint.path
    if "model" not in info or "ema" not in checkpoint.tensors:
        raise ValueError(
            f"{path} does not hold the config of its model, as an older version wrote it; run its training again with "
            "train.steps of one step more, which resumes and writes the model."
        )
    vae = load_vae(config.vae.name)
    recorded = info["config"].get("vae_fingerprint")
    if recorded is not None and not vae.has_fingerprint(recorded):
        raise ValueError(f"{path} was trained with vae.name={config.vae.name!r} of other weights; use that one.")
    network = UNet if config.model.network == "unet" else STDiT
    arguments = {key: value for key, value in info["model"].items() if not key.startswith("_")}
    model = network(**arguments) if config.train.lora.rank is None else load_adapted(config)
    base = recorded_base(checkpoint)
    if base is not None and base != base_fingerprint(model):
        warn_user(
            f"{path} was trained on other weights than those of init_from.path={config.init_from.path!r}, and may not fit them; put "
            "the former model back, or train again."
        )
    # Buffers have no average. A dictionary of both groups would read all tensors of shards, and the weights twice.
    groups: Any = checkpoint.tensors  # ChainMap's type asks for groups that can be written to
    load_weights(model, ChainMap(groups["ema"], groups["model"]), str(path))
    guide = checkpoint.tensors.get("guide")
    return build_pipeline(model.eval(), vae, config, info.get("fps"), guide=guide)


def recorded_base(checkpoint: Checkpoint) -> str | None:
    """The fingerprint of the model that a LoRA in a checkpoint was trained for; None for a checkpoint of a whole model."""
    return checkpoint.info["config"].get("base_fingerprint")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "info.json").is_file() and (folder / "MANIFEST.json").is_file()

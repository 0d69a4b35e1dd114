"""From other people's weights to an STDiT and back, whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor

from stdit.checkpoint.diffusers_dit import config_of
from stdit.checkpoint.files import Weights, read_json, read_weights
from stdit.checkpoint.keymaps import FORMATS, dress, infer, recognise, strip
from stdit.model.stdit import STDiT
from stdit.variants import pick

SCHEDULERS = {cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler)}


class Converted(NamedTuple):
    """`objective`: what the model predicts; `arguments`: its configuration, as inferred and as given."""

    model: STDiT
    objective: str
    arguments: dict


def to_stdit(weights: Weights, name: str, given: dict | None = None) -> Converted:
    """An STDiT with these weights. `given` settles what tensors cannot tell (num_heads=4).

    Raises ValueError for another format than `name`, and with the list of keys that are missing, unexpected or of
    another shape.
    """
    form, given = pick(FORMATS, name, "format"), given or {}
    for key in given:
        pick(dict.fromkeys(STDiT._get_init_keys(STDiT)), key, "setting of a model")
    tensors = form.to_dit({key: value.float() for key, value in weights.tensors.items()})
    guess = recognise(weights.tensors)
    if getattr(tensors.get("x_embedder.proj.weight"), "ndim", 4) == 2:
        raise ValueError(
            f"{weights.origin!r} are stdit's own weights already; STDiT.from_pretrained loads their folder."
        )
    if "x_embedder.proj.weight" not in tensors or (guess, name) in (
        ("latte", "dit"),
        ("latte", "sit"),
        ("dit", "latte"),
    ):
        hint = f"they look like {guess!r}" if guess else f"they begin with {sorted(weights.tensors)[:3]}"
        raise ValueError(f"{weights.origin!r} are no {name!r} weights: {hint}. Use --from {guess or 'another format'}.")
    try:
        found = form.arguments(tensors, weights.config)
        arguments = {**infer(tensors, {**found, **given}), **found, **given}
        tensors = form.adapt(strip(tensors), arguments)
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{weights.origin!r} lacks {error}, which every {name!r} model has; is the file whole?"
        ) from error
    with torch.device("meta"):
        model = STDiT(**arguments)
    _compare(weights.origin, tensors, dict(model.state_dict()))
    model = STDiT(**arguments)
    model.load_state_dict(tensors)
    return Converted(model.eval(), form.objective, arguments)


def _compare(origin: str, have: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    lists = {
        "missing": sorted(set(want) - set(have)),
        "unexpected": sorted(set(have) - set(want)),
        "of another shape": [
            f"{key} {tuple(have[key].shape)} (expected {tuple(want[key].shape)})"
            for key in sorted(set(have) & set(want)) if have[key].shape != want[key].shape
        ],
    }  # fmt: skip
    wrong = [f"{what}: {', '.join(keys[:6])}{' ...' * (len(keys) > 6)}" for what, keys in lists.items() if keys]
    if wrong:
        raise ValueError(f"{origin!r} does not fit, nothing was loaded. {'; '.join(wrong)}.")


def from_stdit(model: STDiT, name: str) -> dict[str, Tensor]:
    """The tensors of a model under another format's names; ValueError if that format cannot say what it is."""
    form = pick(FORMATS, name, "format")
    if reason := form.needs(model):
        raise ValueError(f"this model cannot be written as {name!r} without other numbers coming out: {reason}.")
    own = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return form.from_dit(form.restore(dress(own, model), model))


def write_original(model: STDiT, name: str, output: Path) -> None:
    """A .pt or .safetensors file of the original's layout; for diffusers a folder."""
    tensors = {key: value.contiguous() for key, value in from_stdit(model, name).items()}
    if name != "diffusers":
        with beside(output) as part:
            if output.suffix == ".safetensors":
                save_file(tensors, part)
            else:
                torch.save(tensors, part)
        return
    from diffusers import DiTTransformer2DModel

    theirs = DiTTransformer2DModel(**config_of(model))
    theirs.load_state_dict(tensors)
    with beside(output) as part:
        theirs.save_pretrained(part)


class beside:
    """Write to a place of its own, then take the name at once; FileExistsError rather than overwrite."""

    def __init__(self, output: Path):
        self.output, self.part = output, output.with_name(f".{output.name}-{os.getpid()}")

    def __enter__(self) -> Path:
        taken = any(self.output.iterdir()) if self.output.is_dir() else self.output.exists()
        if taken:
            raise FileExistsError(f"{str(self.output)!r} exists already; choose another --output, or remove it.")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            os.replace(self.part, self.output)
        elif self.part.is_dir():
            shutil.rmtree(self.part, ignore_errors=True)
        else:
            self.part.unlink(missing_ok=True)


class DiTFolder(NamedTuple):
    """A whole `DiTPipeline` folder: its transformer's weights, VAE, scheduler and class names."""

    weights: Weights
    vae: AutoencoderKL
    scheduler: Any
    class_names: list[str] | None


def read_dit_pipeline(folder: Path) -> DiTFolder:
    """Read what `DiTPipeline.save_pretrained` wrote."""
    index = read_json(folder / "model_index.json")
    kind = index.get("scheduler", [None, None])[1]
    scheduler = pick(SCHEDULERS, str(kind), "scheduler class").from_pretrained(folder / "scheduler")
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
    names = index.get("id2label") or {}
    ordered = [names[str(i)] for i in range(len(names))] if names else None
    return DiTFolder(read_weights(folder / "transformer"), vae, scheduler, ordered)


def describe(converted: Converted) -> str:
    """The inferred configuration in one line a person can check."""
    a, model = converted.arguments, converted.model
    parts = [
        f"depth {a['depth']}", f"width {a['hidden_size']}", f"{a['num_heads']} heads", f"patch {list(a['patch_size'])}",
        f"{a['in_channels']} channels", f"{a['num_classes']} classes", f"latents {list(a['sample_size'])}",
        f"axes {list(a['axes'])}", "learned variance" if a["learn_sigma"] else "no learned variance",
        f"{sum(p.numel() for p in model.parameters()):,} parameters", f"objective {converted.objective}",
    ]  # fmt: skip
    return ", ".join(parts)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["num_heads=4"] -> {"num_heads": 4}; ValueError for anything else than key=value."""
    parsed = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise ValueError(f"{setting!r} is no setting; write key=value, for example --set num_heads=4.")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed

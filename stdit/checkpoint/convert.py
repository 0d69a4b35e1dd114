"""From other people's weights to an STDiT and back, whole or not at all."""

import json
import os
import shutil
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import Tensor

from stdit.checkpoint import diffusers_dit, diffusers_latte
from stdit.checkpoint.files import Weights, check_tensors, read_json, read_weights
from stdit.checkpoint.keymaps import FORMATS, dress, infer, recognise, strip
from stdit.model.stdit import STDiT
from stdit.variants import pick

SCHEDULERS = {cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler)}


# Formats that are a folder diffusers itself writes: its class, and that class's arguments for a model of ours.
DIFFUSERS = {
    "diffusers": ("DiTTransformer2DModel", diffusers_dit.config_of),
    "diffusers_latte": ("LatteTransformer3DModel", diffusers_latte.config_of),
}


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
    form, given = pick(FORMATS, name, "format"), check_settings(given or {})
    guess = recognise(weights.tensors)
    if getattr(weights.tensors.get("x_embedder.proj.weight"), "ndim", 4) == 2:
        raise ValueError(
            f"{weights.origin!r} are stdit's own weights already; STDiT.from_pretrained loads their folder."
        )
    if guess != name and (guess, name) != ("dit", "sit"):  # those two look alike
        hint = f"they look like {guess!r}" if guess else f"they begin with {sorted(weights.tensors)[:3]}"
        raise ValueError(f"{weights.origin!r} are no {name!r} weights: {hint}. Use --from {guess or 'another format'}.")
    tensors = form.to_dit({key: value.float() for key, value in weights.tensors.items()})
    try:
        found = form.arguments(tensors, weights.config)
        arguments = {**infer(tensors, {**found, **given}), **found, **given}
        tensors = form.adapt(strip(tensors), arguments)
    except (KeyError, IndexError, ZeroDivisionError) as error:
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
    check_tensors(tensors, "the model")
    if name not in DIFFUSERS:
        if output.is_dir() or output.suffix not in (".pt", ".safetensors"):
            raise ValueError(
                f"--output {str(output)!r} is no file name for {name!r} weights; end it in .pt or .safetensors."
            )
        with beside(output) as part:
            if output.suffix == ".safetensors":
                save_file(tensors, part)
            else:
                torch.save(tensors, part)
        return
    kind, config_of = DIFFUSERS[name]
    theirs = getattr(diffusers, kind)(**config_of(model))
    theirs.load_state_dict(tensors)
    with beside(output) as part:
        theirs.save_pretrained(part)


class beside:
    """Write to a place of its own, then take the name at once; FileExistsError rather than overwrite."""

    def __init__(self, output: Path):
        self.output, self.part = output, output.with_name(f"{output.name}-unfinished-{os.getpid()}")

    def __enter__(self) -> Path:
        taken = any(self.output.iterdir()) if self.output.is_dir() else self.output.exists()
        if taken:
            raise FileExistsError(f"{str(self.output)!r} exists already; choose another --output, or remove it.")
        parents = [folder for folder in self.output.parents if not folder.exists()]
        self.made = parents[-1] if parents else None  # taken away again if nothing comes to stand in it
        self.output.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            os.replace(self.part, self.output)
            return
        if self.part.is_dir():
            shutil.rmtree(self.part, ignore_errors=True)
        else:
            self.part.unlink(missing_ok=True)
        if self.made is not None:
            shutil.rmtree(self.made, ignore_errors=True)


class DiTFolder(NamedTuple):
    """A whole `DiTPipeline` folder: its transformer's weights, VAE, scheduler and class names."""

    weights: Weights
    vae: AutoencoderKL
    scheduler: Any
    class_names: list[str] | None


def read_dit_pipeline(folder: Path) -> DiTFolder:
    """Read what `DiTPipeline.save_pretrained` wrote."""
    index = read_json(folder / "model_index.json")
    named = index.get("scheduler")
    kind = named[1] if isinstance(named, list) and len(named) == 2 else named
    scheduler = pick(SCHEDULERS, str(kind), "scheduler class").from_pretrained(folder / "scheduler")
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(
            f"{str(folder)!r}: id2label in model_index.json does not name classes 0 to N-1; mend or remove it."
        )
    ordered = [str(names[str(i)]) for i in range(len(names))] or None
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
    return check_settings(parsed)


def check_settings(given: dict[str, Any]) -> dict[str, Any]:
    """ValueError in one line for a key that is no argument of STDiT, or a value of another kind than it takes."""
    wanted = {
        name: parameter.default for name, parameter in signature(STDiT.__init__).parameters.items() if name != "self"
    }
    for key, value in given.items():
        example = pick(wanted, key, "setting of a model")
        kind = (list, tuple) if example is None or isinstance(example, list | tuple) else type(example)
        numbers = isinstance(example, tuple) and not isinstance(example[0], str)
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if right and numbers:
            right = len(value) == 3 and all(type(n) is int and n > 0 for n in value)
        if right and kind is int:
            right = value >= (0 if key == "num_classes" else 1)
        if not right:
            raise ValueError(f"--set {key}={value!r} is not of its kind; write it like {key}={json.dumps(example)}.")
    return given

"""Convert published weights to an STDiT and back."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from stdit.checkpoint.files import Weights, check_tensors, read_weights
from stdit.checkpoint.keymaps import FORMATS, from_dit_layout, infer, recognise, to_dit_layout
from stdit.files import read_json
from stdit.model.stdit import STDiT
from stdit.variants import pick

SCHEDULERS = {cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler)}


# Formats that diffusers itself writes, as a folder: its class, and the arguments of that class for an STDiT.
DIFFUSERS = {
    "diffusers": ("DiTTransformer2DModel", diffusers_dit.config_of),
    "diffusers_latte": ("LatteTransformer3DModel", diffusers_latte.config_of),
}


class Converted(NamedTuple):
    """A converted model. objective: what it predicts; arguments: its configuration, inferred and given."""

    model: STDiT
    objective: str
    arguments: dict[str, Any]


def to_stdit(weights: Weights, name: str, settings: dict[str, Any] | None = None) -> Converted:
    """Build an STDiT from the weights of a format.

    settings: arguments that cannot be inferred from the tensors (num_heads=4). Raises ValueError for weights of another
    format than `name`, and with the list of keys that are missing, unexpected or of another shape.
    """
    fmt, settings = pick(FORMATS, name, "format"), check_settings(settings or {})
    likely = recognise(weights.tensors)
    if getattr(weights.tensors.get("x_embedder.proj.weight"), "ndim", 4) == 2:
        raise ValueError(
            f"{weights.origin!r} are stdit's own weights already; STDiT.from_pretrained loads their folder."
        )
    if likely != name and (likely, name) != ("dit", "sit"):  # their keys are the same
        hint = f"they look like {likely!r}" if likely else f"they begin with {sorted(weights.tensors)[:3]}"
        raise ValueError(
            f"{weights.origin!r} are not {name!r} weights: {hint}. Use --from {likely or 'another format'}."
        )
    tensors = fmt.to_dit({key: value.float() for key, value in weights.tensors.items()})
    try:
        found = fmt.arguments(tensors, weights.config)
        arguments = {**infer(tensors, {**found, **settings}), **found, **settings}
        tensors = fmt.adapt(from_dit_layout(tensors), arguments)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{weights.origin!r} lacks {error}, which every {name!r} model has; check that the file is complete."
        ) from error
    with torch.device("meta"):
        model = STDiT(**arguments)
    _check_fit(weights.origin, tensors, dict(model.state_dict()))
    model = STDiT(**arguments)
    model.load_state_dict(tensors)
    return Converted(model.eval(), fmt.objective, arguments)


def _check_fit(origin: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError that lists the first keys that are missing, unexpected or of another shape."""
    lists = {
        "missing": sorted(set(expected) - set(found)),
        "unexpected": sorted(set(found) - set(expected)),
        "of another shape": [
            f"{key} {tuple(found[key].shape)} (expected {tuple(expected[key].shape)})"
            for key in sorted(set(found) & set(expected)) if found[key].shape != expected[key].shape
        ],
    }  # fmt: skip
    wrong = [f"{what}: {', '.join(keys[:6])}{' ...' * (len(keys) > 6)}" for what, keys in lists.items() if keys]
    if wrong:
        raise ValueError(f"{origin!r} does not fit, nothing was loaded. {'; '.join(wrong)}.")


def from_stdit(model: STDiT, name: str) -> dict[str, Tensor]:
    """The tensors of a model under another format's names. Raises ValueError if the format cannot express the model."""
    fmt = pick(FORMATS, name, "format")
    if reason := fmt.mismatch(model):
        raise ValueError(
            f"this model cannot be written as {name!r}, which would compute something else: {reason}; choose another --to."
        )
    tensors = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return fmt.from_dit(fmt.restore(to_dit_layout(tensors, model), model))


def write_original(model: STDiT, name: str, output: Path) -> None:
    """Write a .pt or .safetensors file in the original's layout; for diffusers' formats a folder."""
    tensors = {key: value.contiguous() for key, value in from_stdit(model, name).items()}
    check_tensors(tensors, "the model")
    if name not in DIFFUSERS:
        if output.is_dir() or output.suffix not in (".pt", ".safetensors"):
            raise ValueError(
                f"--output {str(output)!r} is not a file name for {name!r} weights; end it in .pt or .safetensors."
            )
        with atomic_output(output) as tmp:
            if output.suffix == ".safetensors":
                save_file(tensors, tmp)
            else:
                torch.save(tensors, tmp)
        return
    class_name, config_of = DIFFUSERS[name]
    diffusers_model = getattr(diffusers, class_name)(**config_of(model))
    diffusers_model.load_state_dict(tensors)
    with atomic_output(output) as tmp:
        diffusers_model.save_pretrained(tmp)


@contextmanager
def atomic_output(output: Path) -> Iterator[Path]:
    """A context manager that yields a temporary path for a file or folder, and renames it to `output` at its end.

    Raises FileExistsError, before the block runs, rather than overwrite anything. After an error the temporary path and
    the parent folders that were created for it are removed.
    """
    exists = any(output.iterdir()) if output.is_dir() else output.exists()
    if exists:
        raise FileExistsError(f"{str(output)!r} exists already; choose another --output, or remove it.")
    new_parents = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    tmp = output.with_name(f".{os.getpid()}-{output.name}")
    try:
        yield tmp
        os.replace(tmp, output)
    except BaseException:
        if tmp.is_dir():
            shutil.rmtree(tmp, ignore_errors=True)
        else:
            tmp.unlink(missing_ok=True)
        if new_parents:
            shutil.rmtree(new_parents[-1], ignore_errors=True)
        raise


class DiTFolder(NamedTuple):
    """The contents of a `DiTPipeline` folder."""

    weights: Weights
    vae: AutoencoderKL
    scheduler: Any
    class_names: list[str] | None


def read_dit_pipeline(folder: Path) -> DiTFolder:
    """Read a folder that `DiTPipeline.save_pretrained` wrote."""
    index = read_json(folder / "model_index.json")
    entry = index.get("scheduler")
    class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    scheduler = pick(SCHEDULERS, str(class_name), "scheduler class").from_pretrained(folder / "scheduler")
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise ValueError(
            f"{str(folder)!r}: id2label in model_index.json must name classes 0 to N-1; correct or remove it."
        )
    ordered = [str(names[str(i)]) for i in range(len(names))] or None
    return DiTFolder(read_weights(folder / "transformer"), vae, scheduler, ordered)


def describe(converted: Converted) -> str:
    """Describe the inferred configuration in one line, for the user to check."""
    a, model = converted.arguments, converted.model
    parts = [
        f"depth {a['depth']}", f"width {a['hidden_size']}", f"{a['num_heads']} heads", f"patch {list(a['patch_size'])}",
        f"{a['in_channels']} channels", f"{a['num_classes']} classes", f"latents {list(a['sample_size'])}",
        f"axes {list(a['axes'])}", "learned variance" if a["learn_sigma"] else "no learned variance",
        f"{sum(p.numel() for p in model.parameters()):,} parameters", f"objective {converted.objective}",
    ]  # fmt: skip
    return ", ".join(parts)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse settings such as ["num_heads=4"] to {"num_heads": 4}; ValueError for anything other than key=value."""
    parsed = {}
    for setting in settings:
        key, sign, value = setting.partition("=")
        if not sign or not key:
            raise ValueError(f"--set {setting!r} must be key=value; write for example --set num_heads=4.")
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return check_settings(parsed)


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings unchanged; ValueError for a key that is not an argument of STDiT, or a value of a wrong type."""
    defaults = {
        name: parameter.default for name, parameter in signature(STDiT.__init__).parameters.items() if name != "self"
    }
    for key, value in settings.items():
        default = pick(defaults, key, "setting of a model")
        if not _has_type_of(value, default) or (
            type(default) is int and value < (0 if key == "num_classes" else 1)  # sizes
        ):
            raise ValueError(
                f"--set {key}={value!r} has the wrong type or range; write it like {key}={json.dumps(default)}."
            )
    return settings


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether a value has the type of an argument's default; a tuple of numbers is three sizes >= 1."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if default is None or isinstance(default, list | tuple):
        if not isinstance(value, list | tuple):
            return False
        is_size = isinstance(default, tuple) and len(default) > 0 and not isinstance(default[0], str)
        return not is_size or (len(value) == 3 and all(type(n) is int and n > 0 for n in value))
    kind = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kind) and not isinstance(value, bool)

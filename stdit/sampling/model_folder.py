"""A pipeline's folder from anywhere, checked before anything in it is loaded."""

import math
import warnings
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from stdit.files import printable, read_json
from stdit.legacy import renamed_section
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae.adapters import OWN, VAE_SPECS
from stdit.weights import check_fits

OURS = {
    "transformer": (STDiT, UNet),
    "vae": tuple(OWN.values()),
    "scheduler": (STDiTScheduler,),
    "guide": (STDiT, UNet),
}


def check_folder(folder: Path) -> None:
    """Raise ValueError, in one line, for a folder that holds no pipeline, or parts larger than their weights."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no model (no model_index.json); give a folder that stdit train wrote, such as models/NAME."
        )
    if not any((folder / "transformer").glob("*.safetensors*")):
        raise ValueError(
            f"{str(folder)!r} has no weights (transformer/*.safetensors); train again, or copy them there."
        )
    index = read_json(folder / "model_index.json")
    parts = [name for name in OURS if name != "guide" or index.get(name) not in (None, [None, None])]
    classes = {name: _component(folder, name, index.get(name)) for name in parts}
    with warnings.catch_warnings():  # loading warns of old names
        warnings.simplefilter("ignore")
        _check_settings(folder, renamed_section("pipeline", index))
    read_json(folder / "scheduler" / "scheduler_config.json")  # bounded and finite, as diffusers' reading is not
    for name in parts:
        if name == "scheduler":
            continue
        read_json(folder / name / "config.json")
        check_fits(folder / name, lambda cls=classes[name], name=name: cls.from_config(cls.load_config(folder / name)))  # type: ignore[misc]


def _component(folder: Path, name: str, entry: Any) -> Any:
    """The class of a component, one of stdit's own or of those of diffusers that stdit takes."""
    library, class_name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    if isinstance(library, str) and library.partition(".")[0] == "stdit":
        for cls in OURS[name]:
            if cls.__name__ == class_name:
                return cls
    if library == "diffusers" and isinstance(class_name, str):
        cls = getattr(diffusers, class_name, None)
        taken = class_name in VAE_SPECS if name == "vae" else isinstance(cls, type) and issubclass(cls, SchedulerMixin)
        if taken and name in ("vae", "scheduler"):
            return cls
    raise ValueError(
        f"{str(folder)!r}: model_index.json gives {printable(repr(entry))[:100]} as its {name}, which is none of stdit's or of those "
        "of diffusers that it takes; use a folder that stdit wrote."
    )


def _check_settings(folder: Path, index: dict[str, Any]) -> None:
    """Raise ValueError for sizes that are not whole numbers >= 1, a rate that is none, or names that are not text."""
    rules = {
        **dict.fromkeys(("num_frames", "height", "width"), ("a whole number >= 1", _is_count)),
        "fps": ("a number above 0", _is_rate),
        "objective": ("flow or ddpm", lambda value: value in ("flow", "ddpm")),
        "mask_strategies": ("a list of names", lambda value: value is None or _are_texts(value)),
        **dict.fromkeys(
            ("text_encoder", "vae_fingerprint"), ("a text", lambda value: value is None or isinstance(value, str))
        ),
    }
    for key, (expected, holds) in rules.items():
        if key in index and not holds(index[key]):
            raise ValueError(
                f"{str(folder)!r}: {key}={printable(repr(index[key]))[:100]} in model_index.json is not {expected}; correct it."
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)

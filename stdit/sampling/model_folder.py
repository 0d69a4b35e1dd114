"""A pipeline's folder from anywhere, checked before anything in it is loaded."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from stdit.files import printable, read_json
from stdit.legacy import renamed_section
from stdit.model.stdit import STDiT
from stdit.model.unet import UNet
from stdit.sampling.labels import check_settings
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
        check_settings(folder, "model_index.json", renamed_section("pipeline", index))
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

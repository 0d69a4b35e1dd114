"""VAEs released as a bare file of weights: which they are and how large, read from the names and shapes of their tensors."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stdit.files import read_json
from stdit.vae.base import VideoVAE
from stdit.vae.leanvae import LeanVAE
from stdit.vae.taehv import TAEHV
from stdit.weights import on_meta, safetensors_shapes

RELEASED: dict[str, type[TAEHV] | type[LeanVAE]] = {"TAEHV": TAEHV, "LeanVAE": LeanVAE}
_PICKLES = {".pth", ".pt", ".ckpt", ".bin"}
# Parts of a checkpoint that only its training used.
_UNUSED = ("std_layer.",)
_NEWER = "weights of a variant that stdit does not know, or not whole; download them again"


def find_released(name: str) -> Path | None:
    """The file of weights that a path means: itself, or the one in a folder without a config of diffusers; else None.

    ValueError for files of torch, which are pickles, and for a folder with several files of weights.
    """
    path = Path(name)
    if path.is_file() and path.suffix in _PICKLES:
        raise ValueError(_pickled(path))
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        return None
    config = read_json(path / "config.json")
    if config and config.get("_class_name", "LeanVAE") not in RELEASED:
        return None
    files = sorted(path.glob("*.safetensors"))
    pickles = sorted(file for file in path.iterdir() if file.suffix in _PICKLES)
    if not files and not config and pickles:
        raise ValueError(_pickled(pickles[0]))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8])
        raise ValueError(f"{name!r} holds {len(files)} files of weights ({names}); give the path of one of them.")
    return files[0] if files else None


def _pickled(path: Path) -> str:
    return (
        f"{str(path)!r} is a pickle, which stdit never loads: it could run anything. TAEHV's repository has the same weights in its "
        "folder safetensors/; docs/howto/new-vae.md has the line that converts a file you trust."
    )


def load_released(file: Path, name: str, dtype: torch.dtype) -> VideoVAE:
    """Load a VAE from its file of weights; a config.json next to it changes what names and shapes of tensors say.

    Raises ValueError, before memory is taken, for weights of another kind, and for names or shapes that are not those of
    the VAE. name: as it was asked for, for messages.
    """
    shapes = {key: shape for key, shape in safetensors_shapes(file).items() if not key.startswith(_UNUSED)}
    given = {key: value for key, value in read_json(file.parent / "config.json").items() if not key.startswith("_")}
    cls, config = _recognised(shapes, name)
    unknown = sorted(given.keys() - cls().config.keys()) if given else []
    if unknown:
        raise ValueError(f"{str(file.parent / 'config.json')!r}: {cls.name} has no {unknown[0]!r}; remove it.")
    config |= given
    planned = on_meta(lambda: cls(**config), shapes, file.parent / "config.json" if given else file)
    expected = {key: tuple(value.shape) for key, value in planned.state_dict().items()}
    wrong = sorted(key for key in expected.keys() | shapes.keys() if expected.get(key) != shapes.get(key))
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"VAE {name!r}: {len(wrong)} tensors are not those of {cls.name}, the first is {key!r} ({shapes.get(key, 'missing')} in the "
            f"file, {expected.get(key, 'none')} in the network): {_NEWER}."
        )
    tensors = load_file(file)  # raises for shapes that the file does not hold
    vae = cls(**config)
    vae.load_state_dict({key: value for key, value in tensors.items() if not key.startswith(_UNUSED)})
    return torch.nn.Module.to(vae, dtype)  # diffusers' own `to` warns of every conversion


def _recognised(shapes: dict[str, tuple[int, ...]], name: str) -> tuple[Any, dict[str, Any]]:
    """The class that has weights of these names, and its config."""
    for cls in RELEASED.values():
        try:
            config = cls.config_of(shapes)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise ValueError(f"VAE {name!r}: {cls.name} with {error} missing: {_NEWER}.") from error
        except ValueError as error:
            raise ValueError(f"VAE {name!r}: {error}") from error
        if config is not None:
            return cls, config
    first = ", ".join(sorted(shapes)[:3])
    raise ValueError(
        f"VAE {name!r} is a file of weights of neither {' nor '.join(RELEASED)} (it begins with {first}); give a folder with the "
        "config.json of a class of diffusers."
    )

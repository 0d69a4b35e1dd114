"""What files of weights hold, by their headers alone, and whether a model fits them: before anything is allocated."""

import json
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stdit.files import read_json

# Bytes of a safetensors header and of a torch file's index of tensors, about 200 a tensor; unpacked they take 50 times as
# much memory.
LARGEST_HEADER = 4 << 20
_ODD = (ValueError, TypeError, AttributeError, struct.error)  # what odd values in a header raise


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file; ValueError if the file cannot hold what its header announces."""
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > LARGEST_HEADER:
                raise ValueError(f"its header of {length} bytes is beyond reason, the most are {LARGEST_HEADER}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        spans = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
        if spans > path.stat().st_size - 8 - length:
            raise ValueError("it is shorter than its header announces")
        return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
    except (OSError, ArithmeticError, LookupError, RecursionError, *_ODD) as error:
        said = str(error) or type(error).__name__
        raise ValueError(f"{str(path)!r} is not a complete safetensors file ({said}); download it again.") from error


def refuse_code(folder: Path, what: str, kinds: str) -> None:
    """Raise ValueError for a folder of a model of transformers whose configs name code of their own.

    what: the model, and kinds: those that are taken, for the message.
    """
    for file in (
        "config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"
    ):  # fmt: skip
        if "auto_map" in read_json(folder / file):
            raise ValueError(
                f"{what} comes with code of its own (auto_map in {file}), which stdit never runs; use a folder of {kinds} as "
                "transformers has them."
            )


def check_torch_file(path: Path) -> None:
    """Raise ValueError for a file that is no archive of `torch.save`, or that would unpack to more than its own size."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - (1 << 16) - 22))
            _, found, end = stream.read().rpartition(b"PK\5\6")
        listed = struct.unpack_from("<I", end, 8)[0] if found and len(end) >= 12 else None
        if listed is None or listed > LARGEST_HEADER:
            raise ValueError(
                "it is no zip archive, as torch.save writes" if listed is None else "it lists too many files"
            )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        index = max((entry.file_size for entry in entries if entry.filename.endswith("data.pkl")), default=0)
        if packed or index > LARGEST_HEADER or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it would unpack to more than its size, which no file of torch.save does")
    except (ValueError, OSError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(path)!r} is not a complete file of torch weights ({error}); download it again, or save it anew with torch.save."
        ) from error


def check_tensor_bytes(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError for tensors that repeat a few numbers to more than twice the size of their file."""
    # Twice: two names of one tensor are common (tied embeddings).
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    if total > 2 * path.stat().st_size:
        raise ValueError(
            f"{str(path)!r} has {path.stat().st_size} bytes, but its tensors spread to {total}; save them as dense tensors."
        )


def check_fits(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Raise ValueError, before memory is taken, if a folder's weights cannot hold the model that its config asks for.

    build: makes the model from `folder`/config.json; it is called on the meta device. A folder without *.safetensors is
    left to its loader.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= safetensors_shapes(file)
    if not shapes:
        return
    elements, config = sum(map(math.prod, shapes.values())), folder / "config.json"
    found = sum(parameter.numel() for parameter in on_meta(build, shapes, config).parameters())
    if found > elements:
        raise ValueError(_asks_for(config, f"{found} parameters", shapes))


def on_meta(build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]], config: Path) -> nn.Module:
    """What `build` makes, on the meta device; ValueError if it fails, or makes about twice as much as `shapes` hold.

    config: the file that says what is built, for messages.
    """
    elements = sum(map(math.prod, shapes.values()))
    try:
        # Parameters may be registered twice, when one replaces another or is shared.
        with warnings.catch_warnings(), _limited(2 * len(shapes) + 64, 2 * elements), torch.device("meta"):
            warnings.simplefilter("ignore")
            return build()
    except _TooLarge as error:
        raise ValueError(_asks_for(config, str(error), shapes)) from error
    except ValueError as error:
        raise ValueError(f"{str(config)!r}: {error}") from error
    except Exception as error:  # whatever a constructor does with arguments of wrong types and sizes
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{str(config)!r} describes no model ({type(error).__name__}: {said}); {_SAVED_WITH}."
        ) from error


_SAVED_WITH = "use the config.json that was saved with these weights"


def _asks_for(config: Path, size: str, shapes: dict[str, tuple[int, ...]]) -> str:
    elements = sum(map(math.prod, shapes.values()))
    return f"{str(config)!r} asks for {size}, but the weights have {len(shapes)} tensors of {elements} numbers; {_SAVED_WITH}."


class _TooLarge(Exception):
    """A model that is larger than its weights."""


@contextmanager
def _limited(tensors: int, elements: int) -> Iterator[None]:
    """While this is open, a module that registers more parameters than these raises _TooLarge."""
    count = total = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, total
        if parameter is not None:
            count, total = count + 1, total + parameter.numel()
            if count > tensors or total > elements:
                raise _TooLarge(f"{count} tensors of {total} numbers, or more")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()

"""The sources of DiT and Latte, which the user puts into a folder: nothing of theirs is part of this repository."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# A file of each, by which it is recognised, and the command that puts it into the folder {0}.
SOURCES = {
    "DiT": ("DiT/models.py", "git clone https://github.com/facebookresearch/DiT {0}/DiT"),
    "Latte": ("Latte/models/latte.py", "git clone https://github.com/Vchitect/Latte {0}/Latte"),
    "timm": ("timm/models/vision_transformer.py", "pip install --no-deps --target {0} timm"),
}
# Modules that timm imports and that no model here uses; torchvision would bring a torch of its own.
_UNUSED = ("torchvision",)
# Top-level names of modules of the sources, which both have.
_NAMES = ("models", "diffusion", "latte")


def check_sources(folder: Path) -> None:
    """Raise ValueError with the commands that fill the folder if a source is not there."""
    missing = [
        name for name, (file, _) in SOURCES.items()
        if not (folder / file).is_file() and not (name == "timm" and importlib.util.find_spec("timm"))
    ]  # fmt: skip
    if missing:
        commands = " && ".join(SOURCES[name][1].format(folder) for name in missing)
        raise ValueError(
            f"{folder} lacks {' and '.join(missing)}, beside which this is measured; put them there (git ignores /peers): "
            f"{commands}"
        )


def import_source(folder: Path, name: str, modules: Sequence[str]) -> list[ModuleType]:
    """Import modules of the folder `name` of the sources, apart from modules of the same names."""
    with _paths([folder / name, folder]), _stand_ins():
        try:
            return [importlib.import_module(module) for module in modules]
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{folder / name} cannot be imported ({' '.join(str(error).split())[:200]}); fetch it again, or install what "
                "it needs."
            ) from error


@contextmanager
def _paths(folders: Sequence[Path]) -> Iterator[None]:
    """A context manager in which modules are looked for in folders first, and after which theirs are forgotten."""
    before = list(sys.path)
    sys.path[:0] = [str(folder.resolve()) for folder in folders]
    importlib.invalidate_caches()
    _forget()
    try:
        yield
    finally:
        sys.path[:] = before
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in _NAMES]:
        del sys.modules[name]


class _StandIns(MetaPathFinder, Loader):
    """Finds `_UNUSED` modules where nothing else has."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] in _UNUSED else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(__path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        return


@contextmanager
def _stand_ins() -> Iterator[None]:
    """A context manager in which unused modules that are missing can be imported."""
    finder = _StandIns()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, MagicMock)]:
            del sys.modules[name]

"""Typed configs: defaults <- YAML file <- command line. An unknown key is an error, never a silent no-op."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def load_typed(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file of differences and `key=value` overrides into the dataclass `schema`.

    Raises ValueError in one line: the key, what was expected, the nearest name.
    """
    try:
        given = OmegaConf.load(path)
        merged = OmegaConf.merge(OmegaConf.structured(schema), given, OmegaConf.from_dotlist(list(overrides)))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(" ".join(str(error).split())) from error

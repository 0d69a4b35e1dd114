"""Packages that only some shapes of data need."""

from importlib import import_module
from typing import Any


def package(name: str, extra: str, what: str) -> Any:
    """Import a module of an optional package; ValueError with the extra to install if it is not there.

    what: what needs it, the beginning of a sentence in the plural.
    """
    try:
        return import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        raise ValueError(f"{what} need {top} ({error}); run: pip install 'stdit[{extra}]'.") from error


def pyarrow_of(extra: str) -> Any:
    """The package pyarrow with its parquet module; ValueError with the extra to install if it is not there."""
    package("pyarrow.parquet", extra, "parquet files")
    return package("pyarrow", extra, "parquet files")

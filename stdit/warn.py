"""Warnings that point at the line outside the package that caused them."""

import os
import sys
import warnings

# Decorators such as `torch.no_grad` and base classes put frames of these packages between a caller and stdit.
_PASSED_THROUGH = ("torch", "diffusers", "huggingface_hub", "accelerate")
_warned: set[str] = set()


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the file and line of the nearest caller outside stdit (and outside torch and diffusers)."""
    folders = _inner_folders()
    if sys.version_info >= (3, 12):
        warnings.warn(message, category, stacklevel=2, skip_file_prefixes=folders)
        return
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folders):
        frame = frame.f_back
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=names.get("__name__", "<unknown>"),
        registry=names.setdefault("__warningregistry__", {}),
    )


def warn_once(key: str, message: str) -> None:
    """Warn as `warn_user`, once in this process for all messages of a key."""
    if key not in _warned:  # `warnings` would repeat it for every caller and every text
        _warned.add(key)
        warn_user(message)


def _inner_folders() -> tuple[str, ...]:
    files = [__file__, *(sys.modules[name].__file__ for name in _PASSED_THROUGH if name in sys.modules)]
    return (*(os.path.dirname(os.path.abspath(file)) + os.sep for file in files if file), "<frozen importlib")

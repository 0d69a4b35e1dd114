"""Reading and writing video, datasets, the loader, and drawn clips of moving shapes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded at the first access, so that `stdit.data.config` imports neither torch nor a decoder.
_PUBLIC = {
    "VideoError": "stdit.data.video_io", "VideoReader": "stdit.data.video_io", "write_video": "stdit.data.video_write",
}  # fmt: skip

if TYPE_CHECKING:
    from stdit.data.video_io import VideoError, VideoReader
    from stdit.data.video_write import write_video

__all__ = ["VideoError", "VideoReader", "write_video"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'stdit.data' has no attribute {name!r}")

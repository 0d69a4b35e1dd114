"""Clips in and out: reading and writing video, datasets, the loader, drawn shapes."""

from stdit.data.video_io import VideoError, VideoReader
from stdit.data.video_write import write_video

__all__ = ["VideoError", "VideoReader", "write_video"]

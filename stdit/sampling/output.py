"""What a pipeline call returns: a tensor, or frames in the types of diffusers' video pipelines."""

from dataclasses import dataclass
from typing import Any, Literal

from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass
class STDiTPipelineOutput(BaseOutput):
    """The clips of a call with `output_type`.

    frames: "pil": a list of PIL images for each clip; "np": an array (B, F, H, W, 3) in [0, 1]; "pt": a tensor (B, F, 3, H,
    W) in [0, 1]; "latent": a tensor (B, C, T, h, w).
    """

    frames: Any


def as_output(result: Tensor, output_type: str | None, return_dict: bool) -> Any:
    """Pixels (B, 3, F, H, W) in [-1, 1], or latents, as a call asks for them: unchanged if it gives no `output_type`."""
    if output_type is None:
        return result
    frames: Any = result
    if output_type != "latent":
        frames = VideoProcessor(do_resize=False).postprocess_video(result, output_type)
    return STDiTPipelineOutput(frames) if return_dict else (frames,)

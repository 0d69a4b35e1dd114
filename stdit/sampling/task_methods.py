"""The methods of a pipeline for the video tasks, each of which fills a canvas of `tasks`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from stdit.sampling import tasks
from stdit.sampling.call import Call
from stdit.sampling.canvas import Canvas
from stdit.sampling.inputs import Captions, Labels
from stdit.sampling.options import SamplingOptions
from stdit.vae import VideoVAE


class TaskMethods:
    """The video tasks of `STDiTPipeline`.

    Clips are tensors (B, 3, F, H, W) in [-1, 1], images (B, 3, H, W), or PIL images, arrays or lists of these
    (`media.as_clips`). All tasks take the options of `fill` by name.
    """

    config: Any
    video_vae: VideoVAE
    _call: Callable[..., Call]
    _fill: Callable[[Canvas, Call], Any]

    def fill(
        self,
        canvas: Canvas,
        class_labels: Labels = None,
        captions: Captions = None,
        *,
        negative_captions: Captions = None,
        negative_class_labels: Labels = None,
        options: SamplingOptions | None = None,
        **choices: Any,
    ) -> Any:
        """Generate the pixels that a canvas's mask marks -> (B, 3, F, H, W) in [-1, 1]; known pixels are unchanged.

        class_labels: numbers or names. captions: texts. Both have one value per clip, or one for all; None stands for
        no label and for the empty text. Other conditions are given by their keyword. `negative_captions`,
        `negative_class_labels` and `negative_` before another keyword: what guidance leads away from, in place of no
        condition. options: a `SamplingOptions`; choices: its fields, and the arguments of diffusers' pipelines as in
        `STDiTPipeline.__call__`.
        """
        call = self._call(
            class_labels=class_labels, captions=captions, negative_captions=negative_captions,
            negative_class_labels=negative_class_labels, options=options, **choices,
        )  # fmt: skip
        return self._fill(canvas, call)

    def animate(self, image: Any, num_frames: int | None = None, class_labels: Labels = None, **choices: Any) -> Any:
        """Generate `num_frames` frames, the first of which is an image (B, 3, H, W). Options: those of `fill`."""
        frames = self.config.num_frames if num_frames is None else num_frames
        return self.fill(tasks.animate(image, frames), class_labels, **choices)

    def extend(self, clip: Any, after: int = 0, before: int = 0, class_labels: Labels = None, **choices: Any) -> Any:
        """Extend a clip by `before` frames at its start and `after` frames at its end. Options: those of `fill`.

        Beyond the length of training, frames are generated window by window, each with up to `overlap` known frames.
        """
        return self.fill(tasks.extend(clip, after, before, self.video_vae), class_labels, **choices)

    def connect(self, first: Any, last: Any, frames: int, class_labels: Labels = None, **choices: Any) -> Any:
        """Connect two clips, or images (B, 3, H, W), by `frames` new frames. Options: those of `fill`."""
        return self.fill(tasks.connect(first, last, frames, self.video_vae), class_labels, **choices)

    def loop(self, clip: Any, frames: int, class_labels: Labels = None, **choices: Any) -> Any:
        """Close a clip to a loop by `frames` new frames that lead back to its start. Options: those of `fill`."""
        return self.fill(tasks.loop(clip, frames, self.video_vae), class_labels, **choices)

    def interpolate(
        self, clip: Any, factor: int = 2, class_labels: Labels = None, strength: float = 0.4, **choices: Any
    ) -> Any:
        """Multiply the frame rate by `factor`, to (F - 1) * factor + 1 frames. Options: those of `fill`.

        New frames start as the blend of their neighbours at noise level `strength`; raise it for fast motion.
        fps: the clip's rate (None: as trained); a model conditioned on rates gets `factor` times that.
        """
        call = self._call(class_labels=class_labels, **choices)
        canvas = tasks.interpolate(clip, factor, self.video_vae, strength)  # which checks the factor
        options = dataclasses.replace(call.options, fps=(call.options.fps or self.config.fps) * factor)
        return self._fill(canvas, dataclasses.replace(call, options=options))

    def inpaint(self, clip: Any, mask: Any, class_labels: Labels = None, **choices: Any) -> Any:
        """Regenerate the pixels where mask (F, H, W), bool, is true. Options: those of `fill`."""
        return self.fill(tasks.inpaint(clip, mask), class_labels, **choices)

    def edit(self, clip: Any, strength: float = 0.6, class_labels: Labels = None, **choices: Any) -> Any:
        """Noise a clip to level `strength` and denoise it under another label. Options: those of `fill`."""
        return self.fill(tasks.edit(clip, strength), class_labels, **choices)

"""The canvas, a clip of which some pixels are known and the others are to be generated: the input of every task."""

from typing import NamedTuple

import torch
from torch import Tensor


class Canvas(NamedTuple):
    """Clips of which some pixels are known and the others are to be generated.

    pixels: (B, 3, F, H, W) in [-1, 1]. mask: (F, 1, 1) or (F, H, W) bool, true = to be generated. strength: the noise
    level at which generation starts; below 1 it starts from `pixels`. output: the frames that are returned. bounds: (2,
    B, 3, F, H, W), lower and upper bounds of generated pixels that known neighbours in time imply (see
    `conditioning.clamp_to_bounds`), or None.
    """

    pixels: Tensor
    mask: Tensor
    strength: float = 1.0
    output: slice = slice(None)
    bounds: Tensor | None = None

    @property
    def frames_to_generate(self) -> Tensor:
        """The frames, as (F,) bool, in which anything is to be generated."""
        return self.mask.flatten(1).any(1)

    @property
    def output_frames(self) -> range:
        """The numbers of the frames that are returned."""
        return range(self.pixels.shape[2])[self.output]

    def lengthened(self, frames: int) -> "Canvas":
        """The canvas with its last frame repeated until there are `frames`."""
        more = max(0, frames - self.pixels.shape[2])
        return self._replace(
            pixels=torch.cat([self.pixels, self.pixels[:, :, -1:].expand((-1, -1, more, -1, -1))], 2),
            mask=torch.cat([self.mask, self.mask[-1:].expand(more, -1, -1)]),
            bounds=None
            if self.bounds is None
            else torch.cat([self.bounds, self.bounds[:, :, :, -1:].expand((-1, -1, -1, more, -1, -1))], 3),
        )

    def repeated(self, times: int) -> "Canvas":
        """The canvas with each of its clips so many times, next to each other."""
        bounds = None if self.bounds is None else self.bounds.repeat_interleave(times, 1)
        return self._replace(pixels=self.pixels.repeat_interleave(times, 0), bounds=bounds)

    def clips(self, which: slice) -> "Canvas":
        """The canvas of some clips of the batch."""
        bounds = None if self.bounds is None else self.bounds[:, which]
        return self._replace(pixels=self.pixels[which], bounds=bounds)

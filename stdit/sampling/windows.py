"""Windows over long canvases: the frames that a window samples, and those of them that it writes back."""

from typing import NamedTuple

from torch import Tensor

from stdit.sampling.canvas import Canvas
from stdit.sampling.groups import fits
from stdit.vae import VideoVAE


class Window(NamedTuple):
    """A window over a canvas.

    Frames [begin, end) are sampled; those of [keep_from, keep_to) that are to be generated are written back.
    """

    begin: int
    end: int
    keep_from: int
    keep_to: int


class WindowSize(NamedTuple):
    """The size of windows.

    length: frames per window. overlap: the largest number of known frames in a window before the generated ones.
    """

    length: int
    overlap: int


def window_size(
    canvas: Canvas, vae: VideoVAE, *, trained_frames: int, window: int | None = None, overlap: int | None = None
) -> WindowSize:
    """Length and overlap of windows over a canvas; ValueError for a window or overlap that cannot work.

    window, overlap: the options; None stands for the trained length, and for half a window.
    """
    frames, stride = canvas.pixels.shape[2], vae.stride[0]
    if window is not None:
        check_window(window, canvas, vae)
    length = max(trained_frames, 1 + 2 * stride) if window is None else window
    if overlap is not None and not 1 <= overlap <= length - stride:
        raise ValueError(
            f"overlap={overlap} leaves nothing to be generated in a window of {length} frames; use 1 to {length - stride}."
        )
    if frames < length:  # one window; the canvas is padded to whole groups, and the padding is cut off again
        length = next(n for n in range(frames, length + 1) if fits(vae, n))
    return WindowSize(length, length // 2 // stride * stride + 1 if overlap is None else overlap)


def check_window(window: int, canvas: Canvas, vae: VideoVAE) -> None:
    """Raise ValueError for a window (in frames) that is not whole groups of the VAE, or too short to make progress."""
    step, known = vae.temporal_granularity or vae.stride[0], ~canvas.frames_to_generate
    first = int(known.int().argmax()) if known.any() else 0  # frames before the first known ones are generated backward
    least = 1 + (2 if first or bool((known[1:] & ~known[:-1]).any()) else 1) * step
    if not fits(vae, max(window, 1)) or window < min(len(known), least):
        near = next(n for n in range(max(window, least), max(window, least) + step + 1) if fits(vae, n))
        raise ValueError(
            f"window={window} does not hold a first frame, known frames and generated frames in whole groups of VAE "
            f"{vae.name!r}; use window={near}."
        )


def windows_of(to_generate: Tensor, size: WindowSize, *, stride: int) -> list[Window]:
    """All windows that fill a canvas, in their order. to_generate: (F,) bool."""
    left, found = to_generate.clone(), []
    while (window := next_window(left, size.length, overlap=size.overlap, stride=stride)) is not None:
        found.append(window)
        left[window.keep_from : window.keep_to] = False
    return found


def next_window(to_generate: Tensor, length: int, *, overlap: int, stride: int) -> Window | None:
    """The next window over a canvas; None when no frame is left to generate.

    to_generate: (F,) bool. length: 1 + k * stride frames. overlap: at most 1 + j * stride known frames before the
    generated ones. Known frames after a gap are in the window that closes it. Windows begin so that runs of known
    frames fill whole groups of the VAE wherever the canvas allows it.
    """
    frames = len(to_generate)
    if not to_generate.any():
        return None
    if frames <= length:
        return Window(0, frames, 0, frames)
    first = int(to_generate.int().argmax())
    known = (~to_generate[first:]).nonzero()
    end_of_gap = first + int(known[0]) if len(known) else frames
    if first == 0 and end_of_gap < frames and end_of_gap + stride > length:
        return _backward(end_of_gap, frames, length=length, overlap=overlap, stride=stride)
    contexts = range(1, min(overlap, first) + 1, stride) if first else range(1)  # whole groups after a first frame
    goal = stride if end_of_gap < frames else 0
    fitting = [c for c in contexts if c + (end_of_gap - first) + goal <= length]
    context = fitting[-1] if goal and fitting else contexts[-1]
    begin = max(0, min(first - context, frames - length))
    end = keep_to = begin + length
    if goal and end_of_gap + goal > end:
        # A later window closes the gap. Leave it as many frames as a window can generate before known ones, because the
        # motion to the goal may be long.
        leave = length - goal - 1
        keep_to = min(end, max(first + stride, end_of_gap - leave))
    return Window(begin, end, begin, keep_to)


def _backward(end_of_gap: int, frames: int, *, length: int, overlap: int, stride: int) -> Window:
    """A window that generates frames before the first known ones, from these toward the first frame."""
    known = max(stride, (overlap - 1) // stride * stride)
    end = min(frames, end_of_gap + known)
    begin = max(0, end - length)
    # In the VAE a window's first frame is alone, but inside the canvas it belongs to a group: a later window writes it.
    return Window(begin, begin + length, begin + (begin > 0), begin + length)

"""Long canvases, window by window: which frames a model of limited length looks at next, and which of them it keeps."""

from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """Frames begin..end of a canvas are looked at; of those that are open, keep_from..keep_to are kept."""

    begin: int
    end: int
    keep_from: int
    keep_to: int


def next_window(open_frames: Tensor, length: int, overlap: int, stride: int) -> Window | None:
    """The next window over a canvas whose frames are `open_frames` (F,) bool; None when none is open.

    length: 1 + k * stride frames; overlap: at most so many known frames before the open ones, 1 + j * stride. Known
    frames after a gap are in view before the gap is closed. Windows begin so that runs of known frames fill whole
    groups of the VAE wherever the canvas allows it.
    """
    frames = len(open_frames)
    if not open_frames.any():
        return None
    if frames <= length:
        return Window(0, frames, 0, frames)
    first = int(open_frames.int().argmax())
    closed = (~open_frames[first:]).nonzero()
    end_of_gap = first + int(closed[0]) if len(closed) else frames
    if first == 0 and end_of_gap < frames and end_of_gap + stride > length:
        return _backward(end_of_gap, frames, length, overlap, stride)
    contexts = range(1, min(overlap, first) + 1, stride) if first else range(1)  # whole groups behind a first frame
    goal = stride if end_of_gap < frames else 0
    fitting = [c for c in contexts if c + (end_of_gap - first) + goal <= length]
    context = fitting[-1] if goal and fitting else contexts[-1]
    begin = max(0, min(first - context, frames - length))
    end = keep_to = begin + length
    if goal and end_of_gap + goal > end:
        # What follows comes into view later. The way there may be long: leave all the room that a window closes at once.
        leave = length - goal - 1
        keep_to = min(end, max(first + stride, end_of_gap - leave))
    return Window(begin, end, begin, keep_to)


def _backward(end_of_gap: int, frames: int, length: int, overlap: int, stride: int) -> Window:
    """The head of a canvas is open: from the known frames behind it toward the first."""
    known = max(stride, (overlap - 1) // stride * stride)
    end = min(frames, end_of_gap + known)
    begin = max(0, end - length)
    # A window's own first frame stands alone in the VAE; inside the canvas it belongs to a group, which is made later.
    return Window(begin, begin + length, begin + (begin > 0), begin + length)

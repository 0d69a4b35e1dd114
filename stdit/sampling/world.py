"""A world that goes on as one acts: a clip that a causal model continues by one group of frames for each step."""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stdit.conditions import Actions, Guided
from stdit.conditions.values import map_tensors
from stdit.precision import Precision, autocast
from stdit.sampling.autoregressive import Rollout
from stdit.vae.base import DecoderState

REMEMBERED = 32  # groups that `rewind` can take back


class World:
    """Clips that a causal model with actions continues, one latent frame for each `step`.

    Time and memory of a step are constant. `frames` counts the pixel frames so far. What is generated equals
    `STDiTPipeline.stream` with the same actions, to the last bit; with guidance and no action at all, but for rounding, since a
    stream knows beforehand that there is nothing to lead away from.
    """

    def __init__(
        self,
        rollout: Rollout,
        actions: Actions,
        base: Guided,
        *,
        precision: Precision = "auto",
        remembered: int = REMEMBERED,
    ):
        """rollout: of clips without a frame yet. base: the conditions of all frames but for actions."""
        self._rollout, self._actions, self._base, self._precision = rollout, actions, base, precision
        self._decoder: DecoderState | None = None
        self._past: deque[tuple[Rollout, DecoderState | None]] = deque(maxlen=remembered)

    @property
    def frames(self) -> int:
        """The number of pixel frames so far."""
        return self._rollout.engine.vae.pixel_frames(self._rollout.frames) if self._rollout.frames else 0

    @property
    def group(self) -> int:
        """The number of pixel frames that the next step adds: 1 at the start of a clip."""
        return self._rollout.engine.vae.stride[0] if self._rollout.frames else 1

    @property
    def rewindable(self) -> int:
        """The number of steps that `rewind` can take back."""
        return len(self._past)

    def begin(self, clip: Tensor, actions: Any = None) -> None:
        """Add known pixels (B, 3, F, H, W), which come first. actions: one for every frame, or for its last ones."""
        for _ in self._follow(clip, actions, predicts=False):
            pass

    def predictions(self, clip: Tensor, actions: Any) -> Iterator[Tensor]:
        """Follow known pixels (B, 3, F, H, W), and yield what would have been generated in place of each group but the first.

        Every prediction (B, 3, f, H, W) is made from the true frames before it (teacher forcing).
        """
        yield from self._follow(clip, actions, predicts=True)

    def _follow(self, clip: Tensor, actions: Any, predicts: bool) -> Iterator[Tensor]:
        engine, rollout = self._rollout.engine, self._rollout
        vae, total = engine.vae, clip.shape[2]
        rows = self._actions.parse(actions, len(clip))
        self._actions.check_frames(rows, total, vae.stride[0])
        with self._context():
            encoded = vae.encode(clip.to(engine.device, vae.dtype)).float()
        for frame, latents in enumerate(encoded.split(1, dim=2)):
            predicted = None
            with self._context():  # not around a yield: a generator must not keep contexts open
                given = self._given(rows, vae.pixel_frames(frame + 1) - 1, total)
                if predicts and frame:
                    predicted = vae.decode_next(rollout.predict(given).to(vae.dtype), self._decoder)[0]
                self._decode(rollout.add(latents, given))
            if predicted is not None:
                yield predicted.clamp(-1, 1).float().cpu()

    def step(self, action: Any = None) -> Tensor:
        """Take an action, and return the frames (B, 3, f, H, W) in [-1, 1] that follow.

        action: one that is held for the group (a number, a name, or numbers), a list of one for each of its `group` frames, or
        a tensor (B, group) or (B, group, width) of those of every clip; None: no action.
        """
        rows = self._rows(action)
        self._past.append((self._rollout.copy(), self._decoder))
        try:
            last = self.frames + self.group - 1
            with self._context():
                return (
                    self._decode(self._rollout.generate(self._given(rows, last, last + 1))).clamp(-1, 1).float().cpu()
                )
        except BaseException:
            self._rollout, self._decoder = self._past.pop()  # as if nothing had been tried
            raise

    def fork(self) -> "World":
        """A second world with the same past, which goes on by itself."""
        other = copy.copy(self)
        other._rollout, other._past = self._rollout.copy(), self._past.copy()
        return other

    def rewind(self, steps: int = 1) -> None:
        """Take back the last steps; ValueError for more than are remembered."""
        if not 0 <= steps <= len(self._past):
            raise ValueError(f"{steps} steps cannot be taken back; {len(self._past)} are remembered.")
        for _ in range(steps):
            rollout, decoder = self._past.pop()
            self._rollout, self._decoder = rollout, decoder

    def _context(self) -> ExitStack:
        """Without gradients, and in the precision of sampling."""
        engine, stack = self._rollout.engine, ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast(self._precision, engine.device, {engine.model.dtype, engine.vae.dtype}))
        return stack

    def _rows(self, action: Any) -> Tensor:
        """The actions of the next group, per pixel frame: (B, group) or (B, group, width)."""
        count, frames = len(self._rollout.keys), self.group
        if action is None:
            return self._actions.parse(None, count)
        if not isinstance(action, Tensor):
            held = isinstance(action, str) or not isinstance(action, Sequence) or self._is_vector(action)
            action = [action] * frames if held else list(action)
        rows = self._actions.parse(action, count)
        if rows.shape[1] != frames:
            raise ValueError(
                f"{rows.shape[1]} actions for a group of {frames} frames; give one, or one for each frame."
            )
        return rows

    def _is_vector(self, action: Sequence[Any]) -> bool:
        return self._actions.width is not None and not any(isinstance(one, Sequence | Tensor) for one in action)

    def _given(self, rows: Tensor, last: int, total: int) -> Guided:
        """The conditions of the latent frame that ends at pixel frame `last`, with these actions."""
        engine, name = self._rollout.engine, self._actions.name
        null = self._actions.parse(None, len(rows)).expand(rows.shape)
        given = Guided(
            {**self._base.conditions, name: rows}, None if self._base.null is None else {**self._base.null, name: null}
        )
        return engine.conditions_at(given, [last], total, starts=last == 0).change(
            partial(map_tensors, change=lambda x: x.to(engine.device))
        )

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self._rollout.engine.vae
        pixels, self._decoder = vae.decode_next(latents.to(vae.dtype), self._decoder)
        return pixels

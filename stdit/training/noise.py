"""Keyed noise, drawn beside the step before the one that needs it: of a long clip it takes as long as many operations of a step."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

from torch import Tensor

from stdit.conditions.base import Key
from stdit.rng import keyed_normal


class Draw(NamedTuple):
    """What noise is a function of: the purpose and the keys of clips, and their shape (C, T, h, w)."""

    purpose: str
    keys: tuple[Key, ...]
    shape: tuple[int, ...]

    def __call__(self) -> Tensor:
        """Draw the noise (clips, C, T, h, w)."""
        return keyed_normal(self.purpose, list(self.keys), self.shape)


B = TypeVar("B")


class NoiseAhead:
    """Noise as `stdit.rng.keyed_normal` draws it, some of it before it is asked for."""

    def __init__(self) -> None:
        self._drawn: dict[Draw, Future[Tensor]] = {}

    def __call__(self, purpose: str, keys: Sequence[Key], shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (len(keys), *shape); row i is a function of keys[i] alone."""
        draw = Draw(purpose, tuple(keys), shape)
        drawn = self._drawn.pop(draw, None)
        return draw() if drawn is None else drawn.result()

    def batches(
        self, batches: Iterator[B], count: int, draws_of: Callable[[B], Sequence[Draw]]
    ) -> Generator[B, None, None]:
        """The next `count` batches; while one is in use, the noise of the one after it is drawn in a thread.

        draws_of: the draws that a batch needs; what else is asked for is drawn when it is.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="stdit-noise") as pool:
            waiting: list[B] = []
            for batch in islice(batches, count):
                draws: dict[Draw, Future[Tensor]] = {draw: pool.submit(draw.__call__) for draw in draws_of(batch)}
                if waiting:
                    yield waiting.pop()
                waiting.append(batch)
                self._drawn = draws  # without those of the batch before, whether they were asked for or not
            yield from waiting

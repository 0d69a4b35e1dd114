"""The interface of every dataset."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from stdit.data.samplers import ClipSize


class Identity(NamedTuple):
    """The identity of a sample, in plain values.

    source: its file relative to the root of the data, or its number in the data. content: a number or a hash that
    changes with what is in the file. label, caption, columns: its annotations. by_content: whether the content alone says
    what is in the clip, in whatever file it lies.
    """

    source: str
    content: int | str | None
    label: int | None = None
    caption: str = ""
    columns: Mapping[str, Any] = {}
    by_content: bool = False


class Dataset(Protocol):
    """A dataset of clips, whose samples are numbered from 0.

    num_classes: 0 for data without labels. class_names: the names of the classes, None if they have none. A
    dataset whose samples need no decoding has `decodes = False`; loader processes would only slow it down. A method
    `identity(index, *, read=False)` gives the `Identity` of a sample; without it, `name` and `record` do. Large datasets may also
    have `captions()`, `column_values(column)` and `known_fingerprint`, which spare a look at every sample.
    """

    num_classes: int
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def record(self, index: int) -> Mapping[str, Any]:
        """The annotations of a sample: label (a number or None), caption, further columns of a manifest."""

    def name(self, index: int) -> str:
        """The name of a sample in messages, such as the path of its file."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """The (frames, height, width) that a sample has before it is cut to a size."""

    def load(self, index: int, rng: np.random.Generator, size: ClipSize | None = None) -> dict[str, Any]:
        """Load a sample, with random choices drawn from `rng`, at `size` (None: the size of the config).

        The result has "pixels" (F, H, W, 3) uint8 and "clip" (`ClipFacts`), or latents (C, T, h, w) and raw conditions.
        Raises VideoError if the file cannot be read.
        """


class Annotated:
    """The single annotations of a dataset's samples by the method names of version 0.1.0, for one more version."""

    def label(self: Dataset, index: int) -> int | None:
        """The label of a sample, None if it has none."""
        return self.record(index).get("label")

    def caption(self: Dataset, index: int) -> str:
        """The caption of a sample, empty if it has none."""
        return self.record(index).get("caption") or ""

    def captions(self: Dataset) -> Iterator[str]:
        """The captions of all samples in their order, empty where there is none."""
        return (self.record(i).get("caption") or "" for i in range(len(self)))


class Captions:
    """The captions of all samples of any dataset, which are read anew whenever they are iterated over and not held in memory."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[str]:
        return captions_of(self.dataset)


def captions_of(dataset: Dataset) -> Iterator[str]:
    """The captions of all samples of any dataset in their order, empty where there is none."""
    return dataset.captions() if hasattr(dataset, "captions") else Annotated.captions(dataset)

"""Captions: tokens of a text encoder, to which blocks attend or which join the patches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from stdit.conditions.base import ClipFacts, Conditioner, Key, with_frames
from stdit.conditions.values import Tokens, map_value
from stdit.nn.embedders import CaptionEmbedder
from stdit.rng import keyed_rng
from stdit.text import Encoded


class Caption(Conditioner):
    """Tokens of a text encoder with `channels` channels; the null is the encoded empty text.

    tokenize: texts -> tokens; a `CaptionCache` in training, the text encoder in sampling.
    """

    name = "caption"
    keywords = ("captions", "caption_mask")
    module = "caption_embedder"
    joins = "tokens"
    clip_ndim = 3
    stored = False  # a latent cache has its own column of captions
    dropout_salt = ()  # shared with labels

    def __init__(self, channels: int):
        self.channels = channels
        self.tokenize: Callable[[Sequence[str]], Encoded] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """Make it if the config has `caption_channels`."""
        return cls(config["caption_channels"]) if config.get("caption_channels") else None

    def embedder(self, dim: int) -> nn.Module:
        """Make the MLP that projects the tokens."""
        return CaptionEmbedder(self.channels, dim)

    def null(self, count: int) -> Tokens:
        """Encode the empty text."""
        return self.encode([""] * count, 1)

    def default(self, count: int) -> Tokens:
        """Raise ValueError, since the model cannot encode the empty text itself."""
        raise ValueError("this model needs `captions`; for unconditional use pass the text encoder's tokens of ''.")

    def value(self, given: Tensor, mask: Tensor | None = None) -> Tokens:
        """Make tokens from captions (B, L, C) or (B, T, L, C) and their mask."""
        mask = None if mask is None else with_frames(mask.bool(), self.clip_ndim - 1)
        return Tokens(with_frames(given, self.clip_ndim), mask)

    def example(self, count: int) -> Tokens:
        """16 zero tokens per clip."""
        return Tokens(torch.zeros(count, 1, 16, self.channels))

    @classmethod
    def read(cls, record: Mapping[str, Any], clip: ClipFacts) -> Any:
        """The record's caption; the empty text if it has none."""
        return record.get("caption") or ""

    @classmethod
    def collate(cls, raws: Sequence[Any]) -> Any:
        """List of texts, with the empty text for missing ones."""
        return ["" if raw is None else raw for raw in raws]

    def drop(self, values: Any, keys: Sequence[Key], rate: float) -> Any:
        """Replace the texts of dropped clips by the empty text."""
        return ["" if gone else text for text, gone in zip(values, self.dropped(keys, rate), strict=True)]

    def encode(self, values: Any, stride: int) -> Tokens:
        """Encode texts with `tokenize`; ValueError if no text encoder is set."""
        if self.tokenize is None:
            raise ValueError(
                "captions need a text encoder; build the pipeline with text_encoder=FOLDER of the one used in training."
            )
        return self.value(*self.tokenize(values))

    def parse(self, given: Any, count: int) -> Tokens:
        """Encode texts, one per clip or one for all, or take tokens (B, L, C) of them; None is the empty text.

        Tokens that are all zeros are padding beside others.
        """
        if not isinstance(given, Tensor):
            return self.encode(self._texts(given, count), 1)
        if given.ndim != 3 or given.shape[-1] != self.channels or len(given) not in (1, count):
            raise ValueError(
                f"tokens of texts are {tuple(given.shape)}; this model takes ({count}, length, {self.channels}), or (1, length, "
                f"{self.channels}) for all clips."
            )
        tokens = given.float().expand(count, -1, -1)
        mask = (tokens != 0).any(-1)
        mask |= ~mask.any(-1, keepdim=True)  # a text of zeros alone has nothing else to attend to
        return self.value(tokens, None if mask.all() else mask)

    def pair(self, given: Any, count: int, negative: Any = None) -> tuple[Tokens, Tokens]:
        """The encoded texts, and the encoded negative or empty ones, padded to one length; or tokens of either."""
        if isinstance(given, Tensor) or isinstance(negative, Tensor):
            value, away = self.parse(given, count), self.parse(negative, count)
            length = max(value.tokens.shape[2], away.tokens.shape[2])
            return _padded(value, length), _padded(away, length)
        texts = self._texts(given, count)
        others = [""] if negative is None else self._texts(negative, count)
        both = self.encode([*texts, *others], 1)  # encoded together, so that both are padded to one length
        null = map_value(both, lambda x: x[count:].expand(count, *x.shape[1:]))
        return map_value(both, lambda x: x[:count]), null  # type: ignore[return-value]

    def preview(
        self, records: Callable[[int], Mapping[str, Any]], samples: int, count: int, *, frames: int
    ) -> dict[str, Any]:
        """Captions of random samples of the data."""
        spread = keyed_rng("preview", 0).integers(samples, size=count)
        return {"captions": [records(int(i)).get("caption") or "" for i in spread], "class_labels": None}

    def _texts(self, given: Any, count: int) -> list[str]:
        texts = [given or ""] if given is None or isinstance(given, str) else list(given)
        if len(texts) not in (1, count):
            raise ValueError(f"{len(texts)} captions for {count} clips; give one per clip, or one for all.")
        return texts if len(texts) == count else texts * count


def _padded(value: Tokens, length: int) -> Tokens:
    """Tokens (B, T|1, L, C) with zeros that are masked, up to a length."""
    mask = torch.ones(value.tokens.shape[:3], dtype=torch.bool) if value.mask is None else value.mask.cpu()
    missing = length - value.tokens.shape[2]
    return Tokens(nn.functional.pad(value.tokens.cpu(), (0, 0, 0, missing)), nn.functional.pad(mask, (0, missing)))

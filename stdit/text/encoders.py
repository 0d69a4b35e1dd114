"""Text encoders: transformers' models, or hashed words that need no weights."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stdit.hub import check_reachable, resolve_source
from stdit.nn.positions import sincos


class Encoded(NamedTuple):
    """tokens (B, L, C) float32, mask (B, L) bool, true for tokens of the text (or its end), false for padding."""

    tokens: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """name: as `load_text_encoder` takes it. channels: of a token. fingerprint: a digest of what decides the output."""

    name: str
    channels: int

    def fingerprint(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> Encoded: ...


class HashedWordEncoder:
    """Each word as a fixed random vector plus its position: no weights, no network, no meaning or grammar.

    Enough for captions of few words; the model learns what the words mean (`caption_embedder`).
    """

    name, channels, max_length = "words", 64, 32

    def fingerprint(self) -> str:
        return f"words-{self.channels}-{self.max_length}"

    def encode(self, texts: Sequence[str]) -> Encoded:
        # An end token, so that no caption is empty.
        lists = [[*_words(text)[: self.max_length - 1], "\0"] for text in texts]
        longest = max(len(words) for words in lists)
        tokens = torch.zeros(len(lists), longest, self.channels)
        mask = torch.zeros(len(lists), longest, dtype=torch.bool)
        positions = sincos(torch.arange(longest), self.channels).float()
        for i, words in enumerate(lists):
            vectors = torch.stack([_word_vector(word, self.channels) for word in words])
            tokens[i, : len(words)] = vectors + positions[: len(words)]
            mask[i, : len(words)] = True
        return Encoded(tokens, mask)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


@lru_cache(maxsize=65536)
def _word_vector(word: str, channels: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(channels)).float()


class TransformersTextEncoder:
    """T5, umT5 or CLIP's text model with its tokenizer, from a folder or a hub id: the last layer's tokens."""

    # The lengths the models were trained at: PixArt's and Latte's for T5, Wan's for umT5, CLIP's own.
    LENGTHS = {"t5": 120, "umt5": 512, "clip": 77, "clip_text_model": 77}

    def __init__(self, name: str, device: torch.device | str = "cpu", max_length: int | None = None):
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"text encoder {name!r} needs transformers: pip install 'stdit[transformers]'.") from error
        source, options = resolve_source(name, "text encoder")
        try:
            check_reachable(source, "config.json", options)
            config = transformers.AutoConfig.from_pretrained(source, **options)
            kind = config.model_type
            if kind not in self.LENGTHS:
                raise ValueError(f"text encoder {name!r} is a {kind!r}; stdit takes {', '.join(self.LENGTHS)}.")
            classes = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
            loader: Any = getattr(transformers, classes.get(kind, "CLIPTextModel"))
            self.model = loader.from_pretrained(source, use_safetensors=True, **options).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        except OSError as error:
            raise ValueError(f"text encoder {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        self.name, self.max_length = name, max_length or self.LENGTHS[kind]
        self.channels: int = self.model.config.hidden_size

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.max_length}".encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        out = self.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return Encoded(out.float().cpu(), inputs.attention_mask.bool().cpu())


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """ "words" (built in), or a folder or hub id of T5, umT5 or CLIP; ValueError if it cannot be loaded."""
    return HashedWordEncoder() if name == "words" else TransformersTextEncoder(name, device)

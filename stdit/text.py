"""Captions to tokens: transformers' encoders, or plain words; and tokens kept on disk, since encoders are slow."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from stdit.hub import check_reachable, resolve_source
from stdit.nn.positions import sincos


class Encoded(NamedTuple):
    """tokens (B, L, C) float32, mask (B, L) bool, true where there is a word (or the end of the text)."""

    tokens: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """name: as `load_text_encoder` takes it. fingerprint: of what decides its output."""

    name: str
    channels: int

    def fingerprint(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> Encoded: ...


class HashedWordEncoder:
    """Each word a fixed random vector, its place added: no weights, no network; knows nothing of meaning or grammar.

    Enough for captions of few words; a transformer learns what they mean (`caption_embedder`).
    """

    name, channels, max_length = "words", 64, 32

    def fingerprint(self) -> str:
        return f"words-{self.channels}-{self.max_length}"

    def encode(self, texts: Sequence[str]) -> Encoded:
        lists = [[*_words(text)[: self.max_length - 1], "\0"] for text in texts]  # an end, so that no caption is empty
        longest = max(len(words) for words in lists)
        tokens = torch.zeros(len(lists), longest, self.channels)
        mask = torch.zeros(len(lists), longest, dtype=torch.bool)
        places = sincos(torch.arange(longest), self.channels).float()
        for i, words in enumerate(lists):
            tokens[i, : len(words)] = (
                torch.stack([_vector(word, self.channels) for word in words]) + places[: len(words)]
            )
            mask[i, : len(words)] = True
        return Encoded(tokens, mask)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


@lru_cache(maxsize=65536)
def _vector(word: str, channels: int) -> Tensor:
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
        given = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        out = self.model(input_ids=given.input_ids, attention_mask=given.attention_mask).last_hidden_state
        return Encoded(out.float().cpu(), given.attention_mask.bool().cpu())


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """ "words" (built in), or a folder or hub id of T5, umT5 or CLIP; ValueError if it cannot be had."""
    return HashedWordEncoder() if name == "words" else TransformersTextEncoder(name, device)


class CaptionCache:
    """Tokens of captions in a folder, encoded once: shards of half precision, found by their text.

    One folder belongs to one encoder. New captions are added behind; what is there is never written again.
    """

    SHARD = 1024

    def __init__(self, folder: Path, encoder: TextEncoder):
        self.folder, self.channels = folder / encoder.fingerprint(), encoder.channels  # the encoder itself may go
        self._open: dict[str, Any] = {}
        self._where: dict[str, tuple[str, int]] = {}
        for index in sorted(self.folder.glob("captions-*.json")):
            file = index.with_suffix(".safetensors").name
            self._where |= {text: (file, row) for row, text in enumerate(json.loads(index.read_text()))}

    def add(self, encoder: TextEncoder, texts: Sequence[str], progress: bool = True) -> None:
        """Encode those of `texts`, and the empty one, that are not there yet."""
        new = [text for text in dict.fromkeys(["", *texts]) if text not in self._where]
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(new), desc=f"captions ({encoder.name})", unit="caption", disable=not progress or not new)
        for first in range(0, len(new), self.SHARD):
            part = new[first : first + self.SHARD]
            batches = []
            for i in range(0, len(part), 32):
                batches.append(encoder.encode(part[i : i + 32]))
                bar.update(len(batches[-1].mask))
            self._write(part, _together(batches))
        bar.close()

    def _write(self, texts: list[str], encoded: Encoded) -> None:
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
        file = self.folder / f"captions-{digest}.safetensors"
        beside = self.folder / f".{os.getpid()}-{file.name}"
        save_file({"tokens": encoded.tokens.half(), "mask": encoded.mask}, beside)
        os.replace(beside, file)
        index = beside.with_suffix(".json")
        index.write_text(json.dumps(texts))
        os.replace(index, file.with_suffix(".json"))  # last: a shard without an index is not there
        self._where |= {text: (file.name, row) for row, text in enumerate(texts)}

    def __len__(self) -> int:
        return len(self._where)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Tokens and masks of captions that were added, padded to the longest."""
        return _together(list(self._read(texts)))

    def _read(self, texts: Sequence[str]) -> Iterator[Encoded]:
        for text in texts:
            if text not in self._where:
                raise ValueError(
                    f"the caption {text[:60]!r} was never encoded into {self.folder}; encode the data again."
                )
            name, row = self._where[text]
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            file = self._open[name]
            mask = file.get_slice("mask")[row]
            length = int(mask.sum())  # words come first
            yield Encoded(file.get_slice("tokens")[row, :length][None].float(), mask[None, :length])


def _together(parts: list[Encoded]) -> Encoded:
    """Behind each other, padded to the longest with tokens that no one sees."""
    longest = max(part.mask.shape[1] for part in parts)
    tokens = [torch.nn.functional.pad(part.tokens, (0, 0, 0, longest - part.mask.shape[1])) for part in parts]
    masks = [torch.nn.functional.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    return Encoded(torch.cat(tokens), torch.cat(masks))


def encode_with_null(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Encoded, Encoded]:
    """Captions, and as many empty ones, of one length."""
    both = encoder.encode([*texts, ""])
    tokens, mask = both
    count = len(texts)
    return Encoded(tokens[:count], mask[:count]), Encoded(
        tokens[count:].expand(count, -1, -1), mask[count:].expand(count, -1)
    )

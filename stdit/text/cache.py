"""Tokens of captions on disk, since text encoders are slow."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from stdit.files import atomic_write, write_text
from stdit.text.encoders import Encoded, TextEncoder


class CaptionCache:
    """Tokens of captions in a folder, encoded once: shards of half precision, found by their text.

    One folder belongs to one encoder. New captions are added in further shards; existing ones are never written again.
    """

    SHARD = 1024  # captions per file

    def __init__(self, folder: Path, encoder: TextEncoder):
        self.folder, self.channels = folder / encoder.fingerprint(), encoder.channels  # the encoder itself may be freed
        self._open: dict[str, Any] = {}
        self._index: dict[str, tuple[str, int]] = {}
        for index in sorted(self.folder.glob("captions-*.json")):
            file = index.with_suffix(".safetensors").name
            self._index |= {text: (file, row) for row, text in enumerate(json.loads(index.read_text()))}

    def add(self, encoder: TextEncoder, texts: Sequence[str], progress: bool = True) -> None:
        """Encode those of `texts`, and the empty text, that are not in the cache yet."""
        new = [text for text in dict.fromkeys(["", *texts]) if text not in self._index]
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(new), desc=f"captions ({encoder.name})", unit="caption", disable=not progress or not new)
        for first in range(0, len(new), self.SHARD):
            part = new[first : first + self.SHARD]
            batches = []
            for i in range(0, len(part), 32):
                batches.append(encoder.encode(part[i : i + 32]))
                bar.update(len(batches[-1].mask))
            self._write(part, _pad_and_concatenate(batches))
        bar.close()

    def _write(self, texts: list[str], encoded: Encoded) -> None:
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
        file = self.folder / f"captions-{digest}.safetensors"
        with atomic_write(file) as tmp:
            save_file({"tokens": encoded.tokens.half(), "mask": encoded.mask}, tmp)
        write_text(file.with_suffix(".json"), json.dumps(texts))  # last: a shard without an index is ignored
        self._index |= {text: (file.name, row) for row, text in enumerate(texts)}

    def __len__(self) -> int:
        return len(self._index)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Tokens and masks of captions that were added, padded to the longest."""
        return _pad_and_concatenate(list(self._read(texts)))

    def _read(self, texts: Sequence[str]) -> Iterator[Encoded]:
        for text in texts:
            if text not in self._index:
                raise ValueError(
                    f"the caption {text[:60]!r} was never encoded into {self.folder}; encode the data again."
                )
            name, row = self._index[text]
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            file = self._open[name]
            mask = file.get_slice("mask")[row]
            length = int(mask.sum())  # padding comes last
            yield Encoded(file.get_slice("tokens")[row, :length][None].float(), mask[None, :length])


def _pad_and_concatenate(parts: list[Encoded]) -> Encoded:
    """One batch, padded to the longest with tokens that the mask hides."""
    longest = max(part.mask.shape[1] for part in parts)
    tokens = [torch.nn.functional.pad(part.tokens, (0, 0, 0, longest - part.mask.shape[1])) for part in parts]
    masks = [torch.nn.functional.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    return Encoded(torch.cat(tokens), torch.cat(masks))

"""Text encoders of captions, from transformers or without any weights, and a cache of their tokens on disk."""

import hashlib
import json
import os
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.files import Claimed, atomic_write, claimed, write_text
from stdit.hub import check_reachable, resolve_source
from stdit.legacy import aliases
from stdit.nn.positions import sincos
from stdit.progress import Progress
from stdit.warn import warn_user
from stdit.weights import check_fits, refuse_code

__getattr__ = aliases(__name__)

_PATIENCE = 0.2  # seconds between two looks at captions that another process encodes
_BLOCK = 65536  # captions that are looked up at once


class Encoded(NamedTuple):
    """Encoded texts.

    tokens: (B, L, C) float32. mask: (B, L) bool, true for tokens of the text (with its end token), false for padding.
    """

    tokens: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """The interface of a text encoder.

    name: the name by which `load_text_encoder` loads it. channels: the size C of its tokens. max_length: the largest
    number of tokens of a text.
    """

    name: str
    channels: int
    max_length: int

    def fingerprint(self) -> str:
        """A digest of everything that decides the output."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, not truncated."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode a batch of texts; what exceeds `max_length` tokens is left out."""


class HashedWordEncoder:
    """A text encoder that needs no weights: each word is a fixed random vector plus a position embedding.

    It knows neither meaning nor grammar. That is enough for captions of few words, whose meaning the model learns
    (`caption_embedder`).
    """

    name, channels, max_length = "words", 64, 32

    def fingerprint(self) -> str:
        """The sizes and the version of the division into words, since there are no weights."""
        return f"words-{self.channels}-{self.max_length}-2"

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of words of each text, with its end token."""
        return [len(_words(text)) + 1 for text in texts]

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode the words of each text, in lower case and without punctuation, and an end token."""
        # The end token is there so that no caption is empty.
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


# Scripts that put no blanks between words, by how Unicode's names of their letters begin: every letter is a word.
_WITHOUT_BLANKS = (
    "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI ", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE",
)  # fmt: skip


def _words(text: str) -> list[str]:
    """Split a text into words of letters, digits and the marks on them, in lower case and in one Unicode form (NFC)."""
    words: list[str] = []
    joins = takes_marks = False  # whether the last word goes on with a letter, or with a mark
    for c in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(c)
        if c.isalnum():
            alone = not c.isascii() and unicodedata.name(c, "").startswith(_WITHOUT_BLANKS)
            if joins and not alone:
                words[-1] += c
            else:
                words.append(c)
            joins, takes_marks = not alone, True
        elif kind[0] == "M":
            if takes_marks:
                words[-1] += c
        # Joiners and direction marks are within words, the blank without width is not.
        elif kind != "Cf" or c == "\u200b":
            joins = takes_marks = False
    return words


@lru_cache(maxsize=65536)
def _word_vector(word: str, channels: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(channels)).float()


class TransformersTextEncoder:
    """T5, umT5 or CLIP's text model with its tokenizer, from a folder or a hub id; it returns tokens of the last layer."""

    # Token counts: of PixArt and Latte for T5, of Wan for umT5, of CLIP's training.
    LENGTHS = {"t5": 120, "umt5": 512, "clip": 77, "clip_text_model": 77}

    def __init__(self, name: str, device: torch.device | str = "cpu", max_length: int | None = None):
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"text encoder {name!r} needs transformers: pip install 'stdit[transformers]'.") from error
        source, options = resolve_source(name, "text encoder")
        try:
            check_reachable(source, "config.json", options)
            refuse_code(Path(source), f"text encoder {name!r}", "T5, umT5 or CLIP")
            never: Any = {"trust_remote_code": False}  # else transformers asks on the terminal whether to run it
            config = transformers.AutoConfig.from_pretrained(source, **never, **options)
            kind = config.model_type
            if kind not in self.LENGTHS:
                raise ValueError(f"text encoder {name!r} is a {kind!r}; stdit takes {', '.join(self.LENGTHS)}.")
            classes = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
            loader: Any = getattr(transformers, classes.get(kind, "CLIPTextModel"))
            check_fits(Path(source), lambda: loader(config))
            self.model = loader.from_pretrained(source, use_safetensors=True, **never, **options).eval().to(device)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **never, **options)
        except OSError as error:
            raise ValueError(f"text encoder {name!r} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        self.name, self.max_length = name, max_length or self.LENGTHS[kind]
        self.channels: int = self.model.config.hidden_size

    def fingerprint(self) -> str:
        """A digest of the length, and of the shape and the first values of every weight."""
        digest = hashlib.sha256(f"{self.max_length}".encode())
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.flatten()[:64].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, not truncated."""
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False).input_ids]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Encode texts, padded to the longest and truncated to `max_length` tokens."""
        inputs = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.model.device)
        out = self.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
        return Encoded(out.float().cpu(), inputs.attention_mask.bool().cpu())


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """Load a text encoder: "words" (built in), or a folder or hub id of T5, umT5 or CLIP.

    Raises ValueError if it cannot be loaded.
    """
    return HashedWordEncoder() if name == "words" else TransformersTextEncoder(name, device)


def warn_of_length(encoder: TextEncoder, texts: Sequence[str]) -> None:
    """Warn of the number of texts that are longer than the encoder takes, of which the end is not read."""
    if not hasattr(encoder, "lengths"):  # an encoder of before version 0.2
        return
    lengths = encoder.lengths(texts) if texts else []
    longer = [i for i, length in enumerate(lengths) if length > encoder.max_length]
    if longer:
        warn_user(
            f"{len(longer)} of {len(texts)} captions are longer than the {encoder.max_length} tokens that text encoder "
            f"{encoder.name!r} takes, and their ends are not read; the first is {texts[longer[0]][:60]!r} ... of "
            f"{lengths[longer[0]]} tokens: shorten them, or put what matters first."
        )


class CaptionCache:
    """A cache of caption tokens in a folder, looked up by text, so that every caption is encoded once.

    Tokens are stored in float16, in shards of many captions. Each encoder has a subfolder of its own. New captions are
    added in further shards; existing shards are never rewritten. Processes look captions up by their hashes, in one table
    that all of them map.
    """

    SHARD = 1024  # captions per file

    def __init__(self, folder: Path, encoder: TextEncoder):
        # The encoder itself is not stored, so that its memory can be freed.
        self.folder, self.channels = folder / encoder.fingerprint(), encoder.channels
        self._index = _CaptionIndex(self.folder)
        self._ahead: dict[str, Encoded] = {}

    def add(
        self, encoder: TextEncoder, texts: Iterable[str], progress: bool = True, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Encode and store those of `texts`, and the empty text, that are not in the cache yet.

        Any number of processes can do so at once: each takes parts that no other is at, and returns when all are there.
        Texts are held in memory only if some are missing. share: the number of this process and of all, so that they
        begin at different parts.
        """
        self._index.read()
        left, missing = chain([""], texts), dict[str, None]()
        while block := dict.fromkeys(islice(left, _BLOCK)):
            missing |= dict.fromkeys(self._index.missing(block))
        if progress:  # of a million captions that are here, a tokenizer would take minutes at every start
            warn_of_length(encoder, [text for text in missing if text])
        if missing:
            wanted = list(dict.fromkeys(["", *texts, *missing]))  # an iterator gives its texts only once
            self._add(encoder, wanted, len(missing) if progress else 0, share)
        self._index.store()

    def _add(self, encoder: TextEncoder, wanted: list[str], total: int, share: tuple[int, int]) -> None:
        """Encode and store those that are missing of all texts. total: the length of the bar, 0 for none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Parts of all texts, not of those that are missing, which differ from process to process.
        parts = [wanted[i : i + self.SHARD] for i in range(0, len(wanted), self.SHARD)]
        begin = len(parts) * share[0] // share[1]
        left = deque([*parts[begin:], *parts[:begin]])
        bar = Progress(total=total, desc=f"captions ({encoder.name})", unit="caption", disable=not total)
        elsewhere = 0  # parts in a row that other processes are at
        while left:
            part = left.popleft()
            if not self._index.missing(part):
                continue
            file = self._file(part)
            with ExitStack() as claim:
                try:
                    claim.enter_context(claimed([file]))
                except (
                    ValueError
                ):  # another process is at it; once it has finished, or died, the part is looked at again
                    left.append(part)
                    elsewhere += 1
                    time.sleep(_PATIENCE if elsewhere >= len(left) else 0)
                    continue
                elsewhere = 0
                self._index.read()  # another process may have written this part
                if new := self._index.missing(part):
                    self._write(new, self._encode(encoder, new, bar))
        bar.close()

    def _encode(self, encoder: TextEncoder, texts: list[str], bar: Progress) -> Encoded:
        batches = []
        for i in range(0, len(texts), 32):
            batches.append(encoder.encode(texts[i : i + 32]))
            bar.update(len(batches[-1].mask))
        return _pad_and_concatenate(batches)

    def _file(self, texts: list[str]) -> Path:
        """The file of a shard of texts."""
        return self.folder / f"captions-{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}.safetensors"

    def _write(self, texts: list[str], encoded: Encoded) -> None:
        file = self._file(texts)
        with atomic_write(file) as tmp:
            save_file({"tokens": encoded.tokens.half(), "mask": encoded.mask}, tmp)
        write_text(file.with_suffix(".json"), json.dumps(texts))  # last, since a shard without an index is ignored
        self._index.read()

    def __len__(self) -> int:
        self._index.read()
        return len(self._index)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Look up the tokens and masks of captions that were added, padded to the longest."""
        return _pad_and_concatenate([self._ahead.get(text) or self._read_here(text) for text in texts])

    def _read_here(self, text: str) -> Encoded:
        return self.read(text) if text else self._empty

    @cached_property
    def _empty(self) -> Encoded:
        """The empty text, which stands for every caption that is dropped."""
        return self.read("")

    def have_ready(self, captions: Mapping[str, Encoded]) -> None:
        """Take captions that other processes have read, until the next call, so that they are not read again here."""
        self._ahead = dict(captions)

    def read(self, text: str) -> Encoded:
        """The tokens (1, L, C) and the mask of one caption; ValueError if it was never added."""
        place = self._index.find(text)
        if place is None:
            raise ValueError(
                f"the caption {text[:60]!r} was never encoded into {self.folder}; add the captions of the data again."
            )
        name, row = place
        try:
            with safe_open(self.folder / name, framework="pt") as file:
                mask = file.get_slice("mask")[row]
                length = int(mask.sum())  # padding comes last
                return Encoded(file.get_slice("tokens")[row, :length][None].float(), mask[None, :length])
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder / name} cannot be read ({str(error).partition(chr(10))[0]}); remove it, so that its captions are "
                "encoded again."
            ) from error


class _CaptionIndex:
    """Where the captions of a folder are: their hashes in one sorted array, which takes 24 bytes for each.

    The array is stored in a table beside the shards, which every process maps. Shards that the table does not have are read from
    their lists of texts, and all of them where the table is damaged, missing, or has a shard that is gone.
    """

    def __init__(self, folder: Path):
        self.folder, self._table = folder, folder / "captions.table"
        self._files: list[str] = []
        self._stored = 0  # of these files, the first ones, which the table has
        self._hashes, self._places = np.zeros(0, "S16"), np.zeros((0, 2), np.int32)
        self._recent: dict[bytes, tuple[int, int]] = {}  # not sorted yet, since sorting after every shard takes long

    def read(self) -> None:
        """Take up the shards that were written since the last look."""
        if not self._files:
            self._map()
        for file in sorted(self._shards() - set(self._files)):
            try:
                texts = json.loads((self.folder / file).with_suffix(".json").read_text())
            except (OSError, ValueError):
                continue  # it was cut short; its captions are encoded again
            self._recent |= {_hash_of(text): (len(self._files), row) for row, text in enumerate(texts)}
            self._files.append(file)
            if len(self._recent) > max(1 << 14, len(self._hashes) // 8):
                self._sort()

    def _shards(self) -> set[str]:
        """The shards that are there with their lists of texts."""
        names = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        lists = [name for name in names if name.startswith("captions-") and name.endswith(".json")]
        return names & {f"{name.removesuffix('.json')}.safetensors" for name in lists}

    def _map(self) -> bool:
        """Map the table if it is whole, has the shards that are known here, and none that is gone."""
        try:
            with safe_open(
                self._table, framework="pt"
            ) as table:  # which maps tensors of torch, and copies those of numpy
                hashes, places = (table.get_tensor(name).numpy() for name in ("hashes", "places"))
                listed, checksum = (table.metadata()[name] for name in ("files", "checksum"))
            files = json.loads(listed)
            whole = checksum == _checksum(listed, hashes, places)
        except (OSError, RuntimeError, SafetensorError, ValueError, KeyError, TypeError):
            return False
        if not whole or not set(self._files) <= set(files) <= self._shards():
            return False
        self._files, self._stored, self._recent = files, len(files), {}
        self._hashes, self._places = hashes.view("S16"), places
        return True

    def store(self) -> None:
        """Store the table of all captions if it lacks some; nothing where another process is at it, or it cannot be written."""
        if self._stored == len(self._files):
            return
        # Some file systems have no locks; a quota is an error of safetensors.
        with suppress(OSError, SafetensorError, NotImplementedError, Claimed), claimed([self._table]):
            if self._map():  # another process has stored it meanwhile
                return
            self._sort()
            hashes, listed = self._hashes.view(np.uint8), json.dumps(self._files)
            checksum = _checksum(listed, hashes, self._places)
            with atomic_write(self._table) as tmp:
                tensors = {"hashes": torch.from_numpy(hashes), "places": torch.from_numpy(self._places)}
                save_file(tensors, tmp, metadata={"files": listed, "checksum": checksum})
            self._map()

    def _sort(self) -> None:
        hashes = np.concatenate([self._hashes, np.array(list(self._recent), "S16")])
        places = np.concatenate([self._places, np.array(list(self._recent.values()), np.int32).reshape(-1, 2)])
        self._hashes, first = np.unique(hashes, return_index=True)
        self._places, self._recent = places[first], {}

    def _rows(self, digests: list[bytes]) -> np.ndarray:
        """The row of each hash in the sorted array, -1 if it is not there."""
        wanted = np.array(digests, "S16")
        rows = np.searchsorted(self._hashes, wanted)
        rows[rows == len(self._hashes)] = -1
        there = rows >= 0
        there[there] = self._hashes[rows[there]] == wanted[there]
        return np.where(there, rows, -1)

    def missing(self, texts: Collection[str]) -> list[str]:
        """Those of some texts that are in no shard."""
        digests = [_hash_of(text) for text in texts]
        found = zip(texts, digests, self._rows(digests).tolist(), strict=True)
        return [text for text, digest, row in found if row < 0 and digest not in self._recent]

    def find(self, text: str) -> tuple[str, int] | None:
        """The file and the row of a caption, None if it is in no shard."""
        if not self._files:
            self.read()
        digest = _hash_of(text)
        row = int(self._rows([digest])[0])
        found = self._recent.get(digest) if row < 0 else self._places[row].tolist()
        return None if found is None else (self._files[found[0]], found[1])

    def __len__(self) -> int:
        self._sort()
        return len(self._hashes)

    def __reduce__(self) -> tuple[type["_CaptionIndex"], tuple[Path]]:
        return type(self), (self.folder,)


def _checksum(files: str, *arrays: np.ndarray) -> str:
    """A CRC-32 of the names of the shards and of the arrays of a table."""
    value = zlib.crc32(files.encode())
    for array in arrays:
        value = zlib.crc32(array.data, value)
    return str(value)


def _hash_of(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _pad_and_concatenate(parts: list[Encoded]) -> Encoded:
    """Concatenate to one batch, padded to the longest with tokens that the mask hides."""
    longest = max(part.mask.shape[1] for part in parts)
    tokens = [torch.nn.functional.pad(part.tokens, (0, 0, 0, longest - part.mask.shape[1])) for part in parts]
    masks = [torch.nn.functional.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]
    return Encoded(torch.cat(tokens), torch.cat(masks))

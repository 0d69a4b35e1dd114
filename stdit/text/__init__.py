"""Captions to tokens: text encoders, and their tokens on disk."""

from stdit.legacy import aliases
from stdit.text.cache import CaptionCache
from stdit.text.encoders import (
    Encoded,
    HashedWordEncoder,
    TextEncoder,
    TransformersTextEncoder,
    load_text_encoder,
)

__all__ = [
    "CaptionCache", "Encoded", "HashedWordEncoder", "TextEncoder", "TransformersTextEncoder", "load_text_encoder",
]  # fmt: skip

__getattr__ = aliases(__name__)

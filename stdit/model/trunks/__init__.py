"""Trunks: ways to connect blocks, one per file. A new trunk needs its file and a row here."""

from stdit.model.trunks.base import Trunk, TrunkConfig, TrunkContext, block_position_encodings
from stdit.model.trunks.dual_stream import DualStream
from stdit.model.trunks.long_skip import LongSkip
from stdit.model.trunks.masked import Masked
from stdit.model.trunks.stack import Stack
from stdit.model.trunks.u_shape import UShape

TRUNKS: dict[str, type[Trunk]] = {
    "stack": Stack,  # DiT
    "long_skip": LongSkip,  # U-ViT
    "masked": Masked,  # MDT v2
    "dual_stream": DualStream,  # SD3, FLUX
    "u_shape": UShape,  # DiffiT
}

__all__ = ["TRUNKS", "Trunk", "TrunkConfig", "TrunkContext", "block_position_encodings"]

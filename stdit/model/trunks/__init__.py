"""Ways to wire blocks, one a file. A new one is its file and a row here."""

from stdit.model.trunks.base import Build, Trunk, Way, time_entries
from stdit.model.trunks.joint import Joint
from stdit.model.trunks.long_skip import LongSkip
from stdit.model.trunks.masked import Masked
from stdit.model.trunks.stack import Stack
from stdit.model.trunks.u_shape import UShape

TRUNKS: dict[str, type[Trunk]] = {
    "stack": Stack,  # DiT
    "long_skip": LongSkip,  # U-ViT
    "masked": Masked,  # MDT v2
    "joint": Joint,  # SD3, FLUX
    "u_shape": UShape,  # DiffiT
}

__all__ = ["TRUNKS", "Build", "Trunk", "Way", "time_entries"]

"""Capabilities of models beyond clips of one shape at one noise level, and the checks that a model has them.

packing: clips of many shapes in one sequence. patch_levels: a noise level per patch. frame_levels: a noise level per
latent frame. masking: training with patches hidden from the encoder. routing: training
with patches that skip the middle blocks. causal: frames attend only to themselves and
earlier frames. text: captions. block_caching: blocks form one residual stream, so that diffusers' caches may skip all
but the first.
"""

from collections.abc import Mapping
from typing import NamedTuple

from stdit.model.trunks import TRUNKS
from stdit.nn.conditioning import CONDITIONINGS


class Need(NamedTuple):
    """A capability that a choice needs, with the choice as the user wrote it and the setting that avoids it."""

    capability: str
    choice: str
    remedy: str


WHAT = {
    "packing": "packed sequences of clips of many shapes",
    "patch_levels": "a noise level per patch",
    "frame_levels": "a noise level per latent frame",
    "masking": "training with hidden patches",
    "routing": "training with patches that skip the middle blocks",
    "causal": "causal attention over frames",
    "text": "captions",
    "block_caching": "blocks that form one residual stream",
}


def supported(trunk: str, conditioning: str, *, causal: bool = False, text: bool = False) -> frozenset[str]:
    """Capabilities of a transformer with this trunk and conditioning."""
    both = TRUNKS[trunk].supports & CONDITIONINGS[conditioning].supports
    found = (
        (both & {"packing", "patch_levels", "routing"})
        | (TRUNKS[trunk].supports & {"masking", "block_caching"})
        | {"frame_levels"}
    )
    found |= ({"causal"} if causal else set()) | ({"text"} if text else set())
    return frozenset(found - ({"packing"} if text or causal else set()))


def check_supported(needs: list[Need], supports: frozenset[str], model: str) -> None:
    """Raise ValueError for the first need that the model does not support."""
    for need in needs:
        if need.capability not in supports:
            raise ValueError(
                f"{need.choice} needs {WHAT[need.capability]}, which {model} does not support; {need.remedy}."
            )


def trunks_that_support(capability: str) -> list[str]:
    """Names of the trunks that support a capability."""
    return [name for name, trunk in TRUNKS.items() if capability in trunk.supports]


def check_trunk_options(trunk: str, given: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise ValueError for an option that only another trunk reads and that differs from its default."""
    for option, value in given.items():
        owners = [name for name, kind in TRUNKS.items() if option in kind.options]
        if owners and trunk not in owners and value != defaults[option]:
            raise ValueError(f"{option}={value!r} belongs to trunk={owners[0]!r}; leave it out.")

"""stdit: video diffusion transformers with spacetime patches, grown from DiT."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stdit import legacy

__version__ = "0.2.0.dev0"

legacy.install()

# Loaded at the first access, so that `import stdit` stays light.
_PUBLIC = {"STDiT": "stdit.model.stdit", "STDiTPipeline": "stdit.sampling.pipeline", "load_vae": "stdit.vae"}

if TYPE_CHECKING:
    from stdit.model.stdit import STDiT
    from stdit.sampling.pipeline import STDiTPipeline
    from stdit.vae import load_vae

__all__ = ["STDiT", "STDiTPipeline", "load_vae"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'stdit' has no attribute {name!r}")

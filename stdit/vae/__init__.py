"""Video VAEs behind one interface: stdit's `tiny`, and the classes of diffusers."""

from stdit.vae.adapters import as_video_vae, load_vae
from stdit.vae.base import VAEGeometry, VideoVAE
from stdit.vae.tiny import TinyVAE

__all__ = ["TinyVAE", "VAEGeometry", "VideoVAE", "as_video_vae", "load_vae"]

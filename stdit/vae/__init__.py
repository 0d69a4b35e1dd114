"""Video VAEs behind one contract: stdit's own `tiny`, and diffusers' classes."""

from stdit.vae.adapters import as_video_vae, load_vae
from stdit.vae.base import VideoVAE
from stdit.vae.tiny import TinyVAE

__all__ = ["TinyVAE", "VideoVAE", "as_video_vae", "load_vae"]

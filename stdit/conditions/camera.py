"""A camera pose for every frame: the example of docs/howto/new-condition.md."""

import torch
from torch import nn

from stdit.conditions.base import Conditioner, last_of_groups


class CameraEmbedder(nn.Module):
    """(B, T|1, 3) poses -> (B, T|1, D); zero where a pose is unknown."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(3, dim)

    def forward(self, poses):
        known = ~poses.isnan().any(-1, keepdim=True)
        return self.linear(poses.nan_to_num()) * known


class Camera(Conditioner):
    """A pose per frame; nan: unknown. A latent frame takes the pose of its last pixel frame."""

    name = "camera"  # key in batches and in `conditions=` of the model
    keywords = ("camera",)  # argument of the pipeline's calls
    module = "camera_embedder"  # name of the embedder in the model
    clip_ndim = 2  # dimensions of a value without the frame axis: (B, 3)

    def embedder(self, dim):
        return CameraEmbedder(dim)

    def null(self, count):
        return torch.full((count, 1, 3), float("nan"))

    @classmethod
    def read(cls, record, clip):
        poses = record.get("camera")  # a column of the manifest: a pose for every frame of the file
        return None if poses is None else [poses[i] for i in clip.frames]

    def encode(self, values, stride):
        return self.value(last_of_groups(values, stride))  # per pixel frame -> per latent frame

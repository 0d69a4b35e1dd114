"""A U-Net for comparison: diffusers' networks for images and for video, with STDiT's interface."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import UNet2DModel, UNet3DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.conditions import Conditions, Tokens, conditioners_of
from stdit.conditions.values import map_tensors
from stdit.legacy import accept_old_keywords
from stdit.model.conditioning import TakesConditions
from stdit.nn.embedders import CaptionEmbedder, LabelEmbedder


class UNet(TakesConditions, ModelMixin, ConfigMixin):
    """diffusers' U-Net with the inputs and outputs of STDiT: all frames share one noise level.

    Images (sample_size[0] = 1) use `UNet2DModel`; video uses `UNet3DConditionModel` (convolutions and attention in
    space and time). channels: of every resolution, which halve height and width. layers: residual blocks of each.
    Video attends to labels and captions as tokens; an image's label is added to its time embedding, and images take no
    captions. causal, window, sink and micro_conditions exist because pipelines read them from the config.
    """

    supports: frozenset[str] = frozenset()  # one noise level for all frames
    supports_patch_levels = False

    def set_pos_scaling(self, pos_scaling: str) -> None:
        """Raise ValueError, since a U-Net has no position encoding to scale."""
        raise ValueError(f"pos_scaling={pos_scaling!r}: a U-Net has no position encoding; leave pos_scaling out.")

    @accept_old_keywords("model")
    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        num_classes: int = 0,
        sample_size: tuple[int, int, int] = (5, 8, 8),
        channels: Sequence[int] = (64, 128),
        layers: int = 1,
        learn_sigma: bool = False,
        class_names: Sequence[str] | None = None,
        caption_channels: int | None = None,
        causal: bool = False,
        window: int | None = None,
        sink: int = 0,
        micro_conditions: Sequence[str] = (),
    ):
        super().__init__()
        if len(channels) < 2 or any(width % 8 for width in channels):
            raise ValueError(f"unet_channels={list(channels)}: give two widths or more, each a multiple of 8.")
        if causal or micro_conditions:
            raise ValueError("a U-Net is not causal and takes labels and captions only; use model.network=transformer.")
        self.conditioners = conditioners_of(self.config)
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.video = sample_size[0] > 1
        factor = 2 ** (len(channels) - 1)
        self.patch_size = (1, factor, factor)  # height and width must be multiples of it
        size = {
            "in_channels": in_channels, "out_channels": self.out_channels, "block_out_channels": tuple(channels),
            "layers_per_block": layers, "norm_num_groups": 8,
        }  # fmt: skip
        inner, width = len(channels) - 1, channels[-1]
        if self.video:
            self.y_embedder = LabelEmbedder(num_classes, width) if num_classes else None
            self.caption_embedder = CaptionEmbedder(caption_channels, width) if caption_channels else None
            self.nothing = None if num_classes or caption_channels else nn.Parameter(torch.zeros(1, 1, width))
            self.unet: nn.Module = UNet3DConditionModel(
                **size, cross_attention_dim=width, attention_head_dim=8,
                down_block_types=("DownBlock3D",) * inner + ("CrossAttnDownBlock3D",),
                up_block_types=("CrossAttnUpBlock3D",) + ("UpBlock3D",) * inner,
            )  # fmt: skip
        else:
            if caption_channels:
                raise ValueError(
                    "the U-Net of images takes no captions; use labels, video, or model.network=transformer."
                )
            self.unet = UNet2DModel(
                **size, sample_size=sample_size[1], attention_head_dim=8, num_class_embeds=num_classes + 1 if num_classes else None,
                down_block_types=("DownBlock2D",) * inner + ("AttnDownBlock2D",),
                up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * inner,
            )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        conditions: Conditions | None = None,
        **keywords: Tensor | None,
    ) -> Tensor:
        """Predict from noisy latents: (B, C, T, H, W) -> (B, C_out, T, H, W).

        timestep: (B,), or (B, T) with the same value for all frames; ValueError for frames at different noise levels.
        """
        batch = len(hidden_states)
        timestep = timestep.expand(batch) if timestep.ndim == 0 else timestep
        if timestep.ndim > 1:
            timestep = timestep.flatten(1)
            if not bool((timestep == timestep[:, :1]).all()):
                raise ValueError(
                    "a U-Net has one noise level for all frames; for known frames and levels by frame use "
                    "model.network=transformer (in training objective.mask_strategy=shared)."
                )
            timestep = timestep[:, 0]
        given = self.gather_conditions(batch, conditions, class_labels=class_labels, **keywords)
        given = map_tensors(given, lambda x: x[:, 0].to(hidden_states.device))  # one value per clip
        if not self.video:
            if hidden_states.shape[2] != 1:
                raise ValueError(
                    f"this U-Net is for images, but got {hidden_states.shape[2]} latent frames; use one frame."
                )
            return self.unet(hidden_states[:, :, 0], timestep, class_labels=given.get("label")).sample[:, :, None]
        tokens = self._tokens(batch, given)
        # On CPUs in bfloat16 the weights' gradients of its convolutions in time are not finite (torch 2.13, oneDNN).
        with torch.autocast("cpu", enabled=False) if hidden_states.device.type == "cpu" else nullcontext():
            dtype = next(self.unet.parameters()).dtype
            return self.unet(hidden_states.to(dtype), timestep, tokens.to(dtype)).sample

    def _tokens(self, batch: int, conditions: Conditions) -> Tensor:
        """Tokens (B, N, D): the label, and the mean of the caption's tokens, since diffusers' blocks take no mask."""
        parts = []
        if self.y_embedder is not None:
            parts.append(self.y_embedder(conditions["label"])[:, None])
        if self.caption_embedder is not None:
            caption = conditions["caption"]
            assert isinstance(caption, Tokens)
            words = self.caption_embedder(caption.tokens)
            mask = words.new_ones(words.shape[:2]) if caption.mask is None else caption.mask.to(words)
            parts.append((words * mask[..., None]).sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1))
        if self.nothing is not None:
            parts.append(self.nothing.expand(batch, -1, -1))
        return torch.cat(parts, 1)

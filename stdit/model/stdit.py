"""STDiT: a diffusion transformer over (B, T, S, D) tokens; DiT is its single-frame case."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stdit.conditions import CONDITIONERS, Conditions, conditioners_of
from stdit.conditions.values import map_tensors, repeat_frames
from stdit.legacy import accept_old_keywords
from stdit.model.checks import check_causal, check_conditioning, check_pos_scaling, check_shape
from stdit.model.conditioning import ConditionEmbedder
from stdit.model.config import size_arguments
from stdit.model.hub_mixin import HubMixin, register_cacheable_blocks
from stdit.model.trunks import TRUNKS, Build, Way, block_position_encodings
from stdit.nn.blocks import FinalLayer, STDiTBlock
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.embedders import (
    LearnedPosEmbed,
    PatchEmbed,
    TimestepEmbedder,
)
from stdit.nn.layout import DenseLayout, PackedLayout, TeacherForcingLayout
from stdit.nn.modulation import Condition
from stdit.nn.positions import spatial_pos_embed
from stdit.nn.tokens import token_grid, unpatchify
from stdit.variants import pick


class STDiT(HubMixin, ConditionEmbedder, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Spacetime diffusion transformer (Peebles and Xie, "Scalable Diffusion Models with Transformers", grown in time).

    `sample_size` (T, H, W) is the latent size it was made for: a hint, and how far off a sink stands at most. `class_names` are accepted
    wherever a label is. positions: sizes never seen go on counting
    ("none") or are squeezed into the trained grid ("interpolate"); may be changed on a trained model
    (`register_to_config(positions=...)`). causal, window, sink: frames see themselves and earlier ones alone,
    the last of them and the first (`nn.attention`).
    conditions: what else than a label the model may be told of a clip (`data.config.MICRO_CONDITIONS`). conditioning: how it is told,
    one of `nn.conditioning.CONDITIONINGS`; caption_channels: the width of a text encoder's tokens; caption_axes: whose
    blocks look at captions (none named: all). trunk: how blocks are wired, one of `model.trunks.TRUNKS`, with num_decoder_blocks
    (masked) and num_single_blocks (joint). The rest is for weights made elsewhere and variants that need it: the clock they
    expect (`timestep_scale`, `timestep_reversed`, `timestep_offset`, `frequency_shift`), an epsilon, where time enters
    (`nn.attention.POSITION_ENCODINGS`, or "stream" as in Latte), which block of an image model each block was (None: inserted), and
    `learned_pos_embed`, `timestep_mlp`, `output_conv`, `gelu`, `relative_position_bias` (U-ViT, MDT, DiffiT). Raises ValueError for widths
    that do not divide, and for choices that are unknown or do not go together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["STDiTBlock"]
    _repeated_blocks = ["STDiTBlock"]
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "norm", "final_layer"]

    @accept_old_keywords("model")
    @register_to_config
    def __init__(
        self,
        depth: int = 12,
        hidden_size: int = 384,
        num_heads: int = 6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        in_channels: int = 16,
        num_classes: int = 0,
        sample_size: tuple[int, int, int] = (1, 32, 32),
        axes: Sequence[str] = ("joint",),
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        qk_norm: bool = False,
        class_names: Sequence[str] | None = None,
        timestep_scale: float = 1.0,
        timestep_reversed: bool = False,
        frequency_shift: float = 0.0,
        norm2_eps: float = 1e-6,
        position_encoding: str = "sincos",
        block_sources: Sequence[int | None] | None = None,
        causal: bool = False,
        window: int | None = None,
        pos_scaling: str = "none",
        micro_conditions: Sequence[str] = (),
        conditioning: str = "adaln_zero",
        caption_channels: int | None = None,
        caption_axes: Sequence[str] = (),
        trunk: str = "stack",
        learned_pos_embed: bool = False,
        timestep_mlp: bool = True,
        output_conv: bool = False,
        gelu: str = "tanh",
        relative_position_bias: bool = False,
        num_decoder_blocks: int = 4,
        num_single_blocks: int = 0,
        timestep_offset: float = 0.0,
        sink: int = 0,
        extra_conditions: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__()
        check_shape(depth, hidden_size, num_heads, patch_size, axes, num_classes, class_names)
        check_pos_scaling(pos_scaling)
        check_causal(causal, window, sink, position_encoding, axes, patch_size, sample_size[0])
        check_conditioning(conditioning, caption_channels, causal, relative_position_bias)
        trunk_class = pick(TRUNKS, trunk, "trunk")
        self.patch_size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))  # JSON gives lists
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(
            hidden_size, scale=timestep_scale, reverse=timestep_reversed, frequency_shift=frequency_shift, mlp=timestep_mlp,
            offset=timestep_offset,
        )  # fmt: skip
        self.conditioners = conditioners_of(self.config)
        for name, kind in CONDITIONERS.items():
            setattr(
                self, kind.module, self.conditioners[name].embedder(hidden_size) if name in self.conditioners else None
            )
        self.conditioning = CONDITIONINGS[conditioning]
        self.adaLN_single = (
            nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)) if self.conditioning.shares else None
        )
        grid = (sample_size[1] // self.patch_size[1], sample_size[2] // self.patch_size[2])
        cycle = [axes[i % len(axes)] for i in range(depth)]
        times = block_position_encodings(position_encoding, cycle)

        def block(i: int, **changes) -> STDiTBlock:
            return STDiTBlock(
                hidden_size, num_heads, cycle[i], mlp_ratio, qk_norm, times[i], norm2_eps, causal, window, conditioning,
                captions=bool(caption_channels) and cycle[i] in (caption_axes or cycle), gelu=gelu,
                bias_grid=grid if relative_position_bias else None, sink=sink, horizon=sample_size[0] // self.patch_size[0], **changes,
            )  # fmt: skip

        build = Build(
            depth, hidden_size, num_heads, mlp_ratio, qk_norm, cycle, times, grid, conditioning, position_encoding, causal,
            relative_position_bias, caption_channels, num_decoder_blocks, num_single_blocks, block,
        )  # fmt: skip
        self.trunk = trunk_class(build)
        self.blocks = nn.ModuleList(self.trunk.make_blocks(build))
        extras = 1 + bool(num_classes) if self.conditioning.joins else 0
        self.pos_embed = LearnedPosEmbed(grid[0], grid[1], hidden_size, extras) if learned_pos_embed else None
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels, conditioning)
        self.final_conv = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if output_conv else None
        self.initialize_weights()

    @classmethod
    def from_size(cls, size: str, **kwargs) -> "STDiT":
        """A fresh model by name ("S/2" ... "XL/8"); keyword arguments as for the constructor, overriding the name's."""
        return cls(**{**size_arguments(size), **kwargs})

    @property
    def supports_patch_levels(self) -> bool:
        """Whether patches may stand at levels of their own."""
        return self.trunk.supports_patch_levels and not self.conditioning.by_tokens

    def set_pos_scaling(self, pos_scaling: str) -> None:
        """Where patches of sizes never trained stand: `extrapolate` counts on, `interpolate` squeezes into the trained grid."""
        check_pos_scaling(pos_scaling)
        self.register_to_config(pos_scaling=pos_scaling)

    def initialize_weights(self) -> None:
        """DiT's initialisation: xavier for linear layers, 0.02 for embeddings, zero for modulation and head."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for conditioner in self.conditioners.values():
            if hasattr(embedder := getattr(self, conditioner.module), "reset"):
                embedder.reset()
        for layer in (self.t_embedder.mlp or [])[::2]:
            nn.init.normal_(layer.weight, std=0.02)
        for module in (*self.blocks, self.final_layer, self.trunk):
            module.reset()
        if self.adaLN_single is not None:
            nn.init.zeros_(self.adaLN_single[1].weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        cache: FrameCache | None = None,
        history: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        conditions: Conditions | None = None,
        **keywords: Tensor | None,
    ) -> Tensor:
        """Predict from noisy latents. Lists of latents and timesteps go through as one packed sequence (see `packed`).

        hidden_states: (B, C, T, H, W); timestep: (B,) or per latent frame (B, T) or per token (B, T, S), on 0..1000;
        class_labels: (B,) or per latent frame (B, T), label num_classes is null, None is null everywhere; captions:
        a text encoder's tokens (B, L, C) or per latent frame (B, T, L, C), caption_mask: (B, L) or (B, T, L), true where
        there is a word; cache: the frames before these, for a
        causal model (`nn.cache`); info: (B|1, N) numbers for `conditions`, nan where unsaid; history: the same clips and
        their timesteps (B, T) as each frame sees those before it (teacher forcing of causal models); kept: (B, n) patches
        that a masked trunk's encoder sees. Returns (B, C_out, T, H, W), with C_out = 2 C if the variance is learned.
        """
        if not isinstance(hidden_states, Tensor):
            return self.packed(hidden_states, timestep, class_labels, conditions, **keywords)  # type: ignore[return-value, arg-type]
        conditions = self.gather_conditions(len(hidden_states), conditions, class_labels=class_labels, **keywords)
        if history is not None:
            hidden_states = torch.cat([history[0], hidden_states], dim=2)
            timestep = torch.cat([history[1], timestep.view(len(history[1]), -1).expand_as(history[1])], dim=1)
            conditions = repeat_frames(conditions, 2)
        if cache is not None and (cache.window, cache.sink) != (self.config.window, self.config.sink):
            raise ValueError(
                f"the cache holds window={cache.window} and sink={cache.sink}, this model was trained with "
                f"window={self.config.window} and sink={self.config.sink}; make the cache with these."
            )
        behind = hidden_states.shape[2] + (0 if cache is None else cache.frames)
        if self.config.sink and hidden_states.shape[2] > 1 and behind > self.config.sample_size[0] and history is None:
            raise ValueError(
                f"a model with sink={self.config.sink} goes on frame by frame beyond the {self.config.sample_size[0]} latent "
                "frames of its training; use pipe.stream, or a cache and one frame a call."
            )
        if visible is not None and not self.trunk.hides:
            raise ValueError(
                f"trunk={self.config.trunk!r} sees every patch; leave `visible` out, or use trunk='masked'."
            )
        frames, rows, columns = token_grid(tuple(hidden_states.shape[2:]), self.patch_size)
        condition = self.condition(timestep, conditions, hidden_states.shape[0])
        tokens = self.x_embedder(hidden_states)
        scale = self._spacing((frames, rows, columns))
        tokens = tokens + self._places(rows, columns, scale[1:]).to(tokens)
        kind = DenseLayout if history is None else TeacherForcingLayout
        extras, shown = 0, None
        if self.conditioning.joins:
            assert condition.tokens is not None
            told = condition.tokens.expand(-1, frames, -1, -1)
            if self.pos_embed is not None:  # captions have places of their own
                told = torch.cat(
                    [
                        told[:, :, : len(self.pos_embed.prefix)] + self.pos_embed.prefix,
                        told[:, :, len(self.pos_embed.prefix) :],
                    ],
                    2,
                )
            extras = told.shape[2]
            shown = None if condition.token_mask is None else condition.token_mask.expand(-1, frames, -1)
            tokens = torch.cat([told.to(tokens), tokens], dim=2)
        layout = kind((frames, rows, columns), cache.frames if cache is not None else 0, scale, extras, shown)
        tokens = self.trunk(tokens, Way(self.blocks, self._call, condition, layout, cache, visible))
        if cache is not None and cache.writing:
            cache.frames += frames
        tokens = tokens[:, :, extras:]
        if history is not None:
            tokens = tokens[:, frames // 2 :]
            condition = condition._replace(embedding=condition.embedding[:, frames // 2 :])
        return self._output(unpatchify(self.final_layer(tokens, condition), self.patch_size, rows))

    def packed(
        self,
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        class_labels: Tensor | None = None,
        conditions: Conditions | None = None,
        **keywords: Tensor | None,
    ) -> list[Tensor]:
        """Clips of different shapes in one sequence, without padding (Dehghani et al., "Patch n' Pack").

        latents: (C, T, H, W) each; timesteps: () or (T,) each; class_labels: (N,). Returns (C_out, T, H, W) each, what
        `forward` gives for each alone. Not for causal models, nor with positions squeezed into the trained grid.
        """
        told_by_tokens = self.conditioning.by_tokens or any(c.joins == "tokens" for c in self.conditioners.values())
        bound = self.config.causal or self.config.pos_scaling != "none" or self.patch_size[0] > 1
        if bound or told_by_tokens or not self.trunk.packs or self.config.relative_position_bias:
            raise ValueError(
                "packed sequences take models with causal=false, pos_scaling='none', patches of one frame, a trunk of "
                "blocks alone without relative_position_bias (such as stack) and a condition that is a vector (such as adaln_zero, and no "
                "captions); use batches of one shape instead."
            )
        grids = [token_grid(tuple(x.shape[1:]), self.patch_size) for x in latents]
        layout = PackedLayout(grids)
        parts = []
        for x, (_, rows, columns) in zip(latents, grids, strict=True):
            embedded = self.x_embedder(x[None])
            parts.append((embedded + self._places(rows, columns).to(embedded)).flatten(1, 2))
        frames = torch.tensor([t for t, _, _ in grids], device=latents[0].device)
        each = torch.cat([step.expand(t) for step, (t, _, _) in zip(timesteps, grids, strict=True)])
        given = self.gather_conditions(len(grids), conditions, class_labels=class_labels, **keywords)

        def per_frame(x: Tensor) -> Tensor:
            x = x.expand(len(grids), *x.shape[1:]).to(each.device)
            if x.shape[1] > 1:
                raise ValueError(
                    "packed clips take conditions of whole clips; use batches of one shape for conditions per frame."
                )
            return x.repeat_interleave(frames, 0)

        condition = self.condition(each, map_tensors(given, per_frame), len(each))
        condition = Condition(
            *(None if part is None else part.reshape(1, 1, len(each), -1) for part in condition[:2])  # type: ignore[arg-type]
        )
        tokens = torch.cat(parts, dim=1)[:, None]
        tokens = self.trunk(tokens, Way(self.blocks, self._call, condition, layout))
        tokens = self.final_layer(tokens, condition, layout)
        pieces = tokens[:, 0].split([t * s for t, s in layout.counts], dim=1)
        return [
            self._output(unpatchify(piece.unflatten(1, count), self.patch_size, rows))[0]
            for piece, count, (_, rows, _) in zip(pieces, layout.counts, grids, strict=True)
        ]

    def _places(self, rows: int, columns: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        if self.pos_embed is not None:
            return self.pos_embed(rows, columns)
        return spatial_pos_embed(rows, columns, self.config.hidden_size, scale)

    def _output(self, prediction: Tensor) -> Tensor:
        """Through the convolution of every frame, if there is one (U-ViT)."""
        if self.final_conv is None:
            return prediction
        frames = prediction.shape[2]
        images = self.final_conv(prediction.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (-1, frames)).transpose(1, 2)

    def _spacing(self, grid: tuple[int, int, int]) -> tuple[float, float, float]:
        """Distances of neighbours in time, y and x: 1, or squeezed and stretched into the grid it was trained on."""
        if self.config.pos_scaling == "none":
            return (1.0, 1.0, 1.0)
        t, y, x = (size // patch for size, patch in zip(self.config.sample_size, self.patch_size, strict=True))
        return (1.0 if self.config.causal else t / grid[0], y / grid[1], x / grid[2])  # a cache counts on

    def _call(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


register_cacheable_blocks()

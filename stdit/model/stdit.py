"""STDiT: a diffusion transformer over tokens (B, T, S, D). DiT is the case of a single frame."""

import inspect
import math
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
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
from stdit.model.capabilities import supported
from stdit.model.checks import POS_SCALINGS, check_arguments, check_choice
from stdit.model.conditioning import ConditionEmbedder
from stdit.model.config import size_arguments
from stdit.model.hub_mixin import HubMixin, register_cacheable_blocks
from stdit.model.trunks import TRUNKS, TrunkConfig, TrunkContext
from stdit.nn.blocks import FinalLayer
from stdit.nn.cache import FrameCache
from stdit.nn.conditioning import CONDITIONINGS
from stdit.nn.context import cached_positions
from stdit.nn.context_parallel import (
    ContextParallel,
    ContextParallelLayout,
    check_ring,
    check_shared_frames,
    check_shared_heads,
)
from stdit.nn.embedders import LearnedPosEmbed, PatchEmbed, TimestepEmbedder
from stdit.nn.layout import DenseLayout, Layout, TeacherForcingLayout
from stdit.nn.modulation import Condition
from stdit.nn.packed import PackedLayout
from stdit.nn.positions import spatial_pos_embed
from stdit.nn.tokens import token_grid, unpatchify

BLOCK_CLASSES = tuple(dict.fromkeys(kind for trunk in TRUNKS.values() for kind in trunk.block_classes))


class STDiT(HubMixin, ConditionEmbedder, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Spacetime diffusion transformer (Peebles and Xie, "Scalable Diffusion Models with Transformers", extended in time).

    Sizes: depth, hidden_size, num_heads, patch_size (time, height, width), mlp_ratio; sample_size (T, H, W), the latent
    size of the training clips, whose T is also the largest distance of a sink frame.
    Attention: axes, cycled over the depth; qk_norm; position_encoding (`nn.config.PositionEncoding`); pos_scaling (see
    `set_pos_scaling`); causal, window and sink in latent frames (`nn.config.BlockConfig`); learned_pos_embed and
    relative_position_bias (U-ViT, MDT).
    Conditions: num_classes with class_names and label_std, the standard deviation of fresh embeddings of labels;
    micro_conditions (`conditions.micro`), caption_channels with caption_axes, extra_conditions (name of a conditioner -> its
    arguments); conditioning, a row of `nn.conditioning.CONDITIONINGS`.
    Trunk: a row of `model.trunks.TRUNKS`, with num_decoder_blocks (masked) and num_single_blocks (dual_stream).
    Flow maps: flow_map, whether the model also takes the timesteps where a step ends; distilled_guidance, the guidance
    scale that is learnt into it (1: none).
    For other models' weights: timestep_scale, timestep_reversed, timestep_offset, timestep_mlp and frequency_shift
    (`nn.embedders.TimestepEmbedder`), norm2_eps, activation (`nn.mlp.ACTIVATIONS`), output_conv, and block_sources, the block of
    an image model from which each block was initialised (None: a new block).

    Raises ValueError for sizes that are not divisible, and for choices that are unknown or conflict.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [kind.__name__ for kind in BLOCK_CLASSES]
    _repeated_blocks = [kind.__name__ for kind in BLOCK_CLASSES]
    _skip_layerwise_casting_patterns = ["x_embedder", "t_embedder", "r_embedder", "norm", "final_layer"]

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
        activation: str = "gelu_tanh",
        relative_position_bias: bool = False,
        num_decoder_blocks: int = 4,
        num_single_blocks: int = 0,
        timestep_offset: float = 0.0,
        sink: int = 0,
        extra_conditions: dict[str, dict[str, Any]] | None = None,
        flow_map: bool = False,
        distilled_guidance: float = 1.0,
        label_std: float = 0.02,
    ):
        super().__init__()
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        check_arguments(self.config, defaults)
        self.patch_size = (int(patch_size[0]), int(patch_size[1]), int(patch_size[2]))  # JSON gives lists
        self.in_channels, self.num_classes = in_channels, num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.gradient_checkpointing = False
        self.context_parallel: ContextParallel | None = None
        self.conditioning = CONDITIONINGS[conditioning]
        self.conditioners = conditioners_of(self.config)
        self.trunk_config = TrunkConfig.from_model_config(self.config)
        grid = self.trunk_config.grid

        self.x_embedder = PatchEmbed(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(
            hidden_size,
            scale=timestep_scale,
            reverse=timestep_reversed,
            offset=timestep_offset,
            frequency_shift=frequency_shift,
            mlp=timestep_mlp,
        )
        self.r_embedder = TimestepEmbedder(hidden_size) if flow_map else None
        for name, kind in CONDITIONERS.items():
            embedder = self.conditioners[name].embedder(hidden_size) if name in self.conditioners else None
            setattr(self, kind.module, embedder)
        self.adaLN_single: nn.Sequential | None = None
        if self.conditioning.shared_adaln:
            self.adaLN_single = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.trunk = TRUNKS[trunk](self.trunk_config)
        self.blocks = nn.ModuleList(self.trunk.make_blocks(self.trunk_config))
        num_prefix = 1 + bool(num_classes) if self.conditioning.in_context else 0
        self.pos_embed = LearnedPosEmbed(*grid, hidden_size, num_prefix) if learned_pos_embed else None
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels, conditioning)
        self.final_conv = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if output_conv else None
        self.initialize_weights()

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "STDiT":
        """Make a new model of a named size ("S/2" ... "XL/8"); keyword arguments are the constructor's."""
        return cls(**{**size_arguments(size), **kwargs})

    @property
    def supports(self) -> frozenset[str]:
        """Capabilities of this model (`model.capabilities`)."""
        c = self.config
        text = any(conditioner.joins == "tokens" for conditioner in self.conditioners.values())
        found = supported(c.trunk, c.conditioning, causal=c.causal, text=text)
        unpackable = c.pos_scaling != "none" or self.patch_size[0] > 1 or c.relative_position_bias
        return found - {"packing"} if unpackable else found

    @property
    def supports_patch_levels(self) -> bool:
        """Whether every patch of a frame may have its own noise level."""
        return "patch_levels" in self.supports

    def set_pos_scaling(self, pos_scaling: str) -> None:
        """Set how positions are scaled at sizes that were not trained.

        "none" counts on beyond the trained grid; "interpolate" squeezes the positions into it.
        """
        check_choice("pos_scaling", pos_scaling, POS_SCALINGS)
        self.register_to_config(pos_scaling=pos_scaling)

    def initialize_weights(self) -> None:
        """Initialise as DiT: Xavier for linear layers, std 0.02 for embeddings, zero for modulation and final layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for conditioner in self.conditioners.values():
            if hasattr(embedder := getattr(self, conditioner.module), "reset"):
                embedder.reset()
        for embedder in (self.t_embedder, self.r_embedder):
            for name, parameter in () if embedder is None else embedder.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(parameter, std=0.02)
        if self.r_embedder is not None:  # its bias is zero, too, so that a fresh one changes nothing
            nn.init.zeros_(self.r_embedder.get_parameter("mlp.2.weight"))
        for module in (*self.blocks, self.final_layer, self.trunk):
            module.reset()
        if self.adaLN_single is not None:
            nn.init.zeros_(next(self.adaLN_single[1].parameters()))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        cache: FrameCache | None = None,
        *,
        conditions: Conditions | None = None,
        history: tuple[Tensor, Tensor] | None = None,
        visible: Tensor | None = None,
        target_timestep: Tensor | None = None,
        **keywords: Tensor | None,
    ) -> Tensor:
        """Predict from noisy latents: (B, C, T, H, W) -> (B, C_out, T, H, W).

        C_out is 2 C if the variance is learned. timestep: (B,), per latent frame (B, T) or per token (B, T, S), on
        0..1000. Conditions are given by name (`conditions`) or by keyword: class_labels (B,) or per latent frame
        (B, T), where label num_classes is the null; captions (B, L, C) or (B, T, L, C) with caption_mask (B, L) or
        (B, T, L), true for tokens; micro_conditions (B|1, N), nan where unknown. cache: keys and values of earlier
        frames, for a causal model. history: clean (or slightly noisy) latents of the same clips and their timesteps
        (B, T), to which each frame attends in place of the noisy earlier frames (teacher forcing of causal models).
        visible: indices of the patches that a masked trunk's encoder (B, n) or the middle blocks of a stack (B, T, n) see. target_timestep: like timestep, where
        the step ends, for a flow map, which predicts the mean velocity on the way; None: at timestep itself. It must not be
        above timestep, for which no model is trained: ValueError on a CPU; elsewhere and in compiled code it is not checked,
        since that would wait for the device. Lists of latents and timesteps run as one packed sequence (see `packed`).
        """
        if not isinstance(hidden_states, Tensor):
            return self.packed(  # type: ignore[return-value]
                hidden_states,
                timestep,
                class_labels,
                conditions=conditions,
                target_timesteps=target_timestep,
                **keywords,
            )
        given = self.gather_conditions(len(hidden_states), conditions, class_labels=class_labels, **keywords)
        if history is not None:
            hidden_states = torch.cat([history[0], hidden_states], dim=2)
            timestep = _after_history(history[1], timestep)
            target_timestep = None if target_timestep is None else _after_history(history[1], target_timestep)
            given = repeat_frames(given, 2)
            visible = visible if visible is None or visible.ndim == 2 else visible.repeat(1, 2, 1)
        self._check_call(hidden_states.shape[2], cache, history is not None, visible)
        grid = token_grid(hidden_states.shape[2:], self.patch_size)
        scale = self._position_scale(grid)
        parallel = self.context_parallel
        if parallel is not None:
            own = partial(parallel.own_frames, copies=1 if history is None else 2)
            hidden_states, timestep = own(hidden_states, dim=2), own(timestep)
            target_timestep = None if target_timestep is None else own(target_timestep)
            given = map_tensors(given, own)
            grid = token_grid(hidden_states.shape[2:], self.patch_size)
        frames, rows, columns = grid
        condition = self.condition(timestep, given, hidden_states.shape[0], target_timestep)
        tokens = self.x_embedder(hidden_states)
        tokens = tokens + self._spatial_pos_embed(rows, columns, scale[1:]).to(tokens)
        tokens, num_prefix, prefix_mask = self._with_prefix(tokens, condition)
        first = 0 if cache is None else cache.frames
        if parallel is not None:
            first = parallel.first_frame(frames if history is None else frames // 2)
        layout = (DenseLayout if history is None else TeacherForcingLayout)(
            grid,
            frame_offset=first,
            scale=scale,
            num_prefix_tokens=num_prefix,
            prefix_mask=prefix_mask,
        )
        if parallel is not None:
            layout = ContextParallelLayout(layout, parallel)
        ctx = self._trunk_context(condition, layout, cache=cache, visible=visible)
        tokens = self.trunk(tokens, ctx)[:, :, num_prefix:]
        if cache is not None and cache.writing:
            cache.finish(frames, cached_positions(ctx.of()))
        if history is not None:
            tokens = tokens[:, frames // 2 :]
            condition = condition._replace(embedding=condition.embedding[:, frames // 2 :])
        output = self._output(unpatchify(self.final_layer(tokens, condition), self.patch_size, rows))
        return output if parallel is None else parallel.gather(output, dim=2)

    def enable_context_parallel(
        self, size: int | None = None, *, ring: int = 1, timeout: timedelta | None = None
    ) -> None:
        """Share the frames of every clip among groups of `size` neighbouring processes (None: all), which call the model alike.

        ring: processes of a group around which keys and values travel, for more processes than heads; the others share heads.
        timeout: of the groups of processes (None: torch's). All processes of the run call this. Outputs and the mean of the
        processes' gradients are those of one process. ValueError for a model that attends to other tokens than those of the
        frames, or whose patches have several frames; for heads that cannot be shared; for a ring of a causal model.
        """
        c = self.config
        own_blocks = c.trunk not in ("stack", "long_skip") or self.conditioning.in_context or c.relative_position_bias
        if own_blocks or self.patch_size[0] > 1:
            raise ValueError(
                f"context parallelism needs trunk=stack or long_skip, patches of one frame, no tokens of the condition among the "
                f"patches and no relative_position_bias; this model has trunk={c.trunk!r}, patch_size={list(self.patch_size)}, "
                f"conditioning={c.conditioning!r}."
            )
        check_ring(ring, causal=c.causal)
        parallel = ContextParallel(size, ring=ring, timeout=timeout)
        if "joint" in self.trunk_config.axes:
            check_shared_heads(c.num_heads, parallel.size, ring, causal=c.causal)
        self.context_parallel = parallel

    def disable_context_parallel(self) -> None:
        """Undo `enable_context_parallel`."""
        self.context_parallel = None

    def _check_call(self, frames: int, cache: FrameCache | None, has_history: bool, visible: Tensor | None) -> None:
        """Raise ValueError for another model's cache, a clip too long for a sink, or unsupported hidden patches."""
        c = self.config
        if self.context_parallel is not None:
            check_shared_frames(frames // (1 + has_history), self.context_parallel.size)
            if cache is not None:
                raise ValueError(
                    "a stream makes frame after frame, which no other process can share; call disable_context_parallel()."
                )
        if cache is not None and (cache.window, cache.sink) != (c.window, c.sink):
            raise ValueError(
                f"the cache has window={cache.window} and sink={cache.sink}, but this model was trained with "
                f"window={c.window} and sink={c.sink}; make the cache with these."
            )
        total = frames + (0 if cache is None else cache.frames)
        if c.sink and frames > 1 and total > c.sample_size[0] and not has_history:
            raise ValueError(
                f"a model with sink={c.sink} runs frame by frame beyond the {c.sample_size[0]} latent frames of its "
                "training clips; use pipe.stream, or a cache and one frame per call."
            )
        if visible is not None and not {"masking", "routing"} & self.supports:
            raise ValueError(
                f"trunk={c.trunk!r} with conditioning={c.conditioning!r} sees every patch; leave `visible` out, or use "
                "trunk='masked' or 'stack'."
            )
        if visible is not None and visible.ndim > 2 and "routing" not in self.supports:
            raise ValueError(
                f"trunk={c.trunk!r} hides the same patches in all frames; give visible as (clips, patches)."
            )
        if visible is not None and self.context_parallel is not None:
            raise ValueError("processes that share frames see every patch; leave `visible` out.")

    def _with_prefix(self, tokens: Tensor, condition: Condition) -> tuple[Tensor, int, Tensor | None]:
        """Put the condition's tokens before the patches (in-context), and return their number and mask, too."""
        if not self.conditioning.in_context:
            return tokens, 0, None
        assert condition.tokens is not None
        frames = tokens.shape[1]
        prefix = condition.tokens.expand(-1, frames, -1, -1)
        if self.pos_embed is not None:
            prefix = self.pos_embed.add_to_prefix(prefix)
        mask = None if condition.token_mask is None else condition.token_mask.expand(-1, frames, -1)
        return torch.cat([prefix.to(tokens), tokens], dim=2), prefix.shape[2], mask

    def packed(
        self,
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        class_labels: Tensor | None = None,
        *,
        conditions: Conditions | None = None,
        target_timesteps: Sequence[Tensor] | None = None,
        **keywords: Tensor | None,
    ) -> list[Tensor]:
        """Predict for clips of different shapes in one sequence without padding (Dehghani et al., "Patch n' Pack").

        latents: (C, T, H, W) each; timesteps: () or (T,) each; class_labels: (N,). Returns (C_out, T, H, W) each, which
        equals the result of `forward` for each clip alone. Raises ValueError if the model does not support packing.
        """
        if "packing" not in self.supports:
            raise ValueError(
                "packed sequences take models with causal=false, pos_scaling='none', patches of one frame, no "
                "relative_position_bias, trunk='stack' or 'long_skip', and conditions that form a vector (such as "
                "adaln_zero, without captions); use batches of one shape instead."
            )
        grids = [token_grid(x.shape[1:], self.patch_size) for x in latents]
        layout, parts = PackedLayout(grids), []
        for x, (_, rows, columns) in zip(latents, grids, strict=True):
            embedded = self.x_embedder(x[None])
            parts.append((embedded + self._spatial_pos_embed(rows, columns).to(embedded)).flatten(1, 2))
        frames = torch.tensor([t for t, _, _ in grids], device=latents[0].device)
        steps, targets = (
            None if given is None else torch.cat([step.expand(t) for step, (t, _, _) in zip(given, grids, strict=True)])
            for given in (timesteps, target_timesteps)
        )
        assert steps is not None
        given = self.gather_conditions(len(grids), conditions, class_labels=class_labels, **keywords)

        def per_frame(x: Tensor) -> Tensor:
            if x.shape[1] > 1:
                raise ValueError(
                    "packed clips take conditions of whole clips; use batches of one shape for conditions per frame."
                )
            return x.expand(len(grids), *x.shape[1:]).to(steps.device).repeat_interleave(frames, 0)

        condition = self.condition(steps, map_tensors(given, per_frame), len(steps), targets)
        embedding, adaln = (None if x is None else x.reshape(1, 1, len(steps), -1) for x in condition[:2])
        assert embedding is not None
        condition = Condition(embedding, adaln)
        ctx = self._trunk_context(condition, layout)
        tokens = self.final_layer(self.trunk(torch.cat(parts, dim=1)[:, None], ctx), condition, layout)
        pieces = tokens[:, 0].split([t * s for t, s in layout.counts], dim=1)
        return [
            self._output(unpatchify(piece.unflatten(1, count), self.patch_size, rows))[0]
            for piece, count, (_, rows, _) in zip(pieces, layout.counts, grids, strict=True)
        ]

    def _trunk_context(
        self, condition: Condition, layout: Layout, *, cache: FrameCache | None = None, visible: Tensor | None = None
    ) -> TrunkContext:
        return TrunkContext(
            blocks=list(self.blocks),
            call=self._call_block,
            config=self.trunk_config.block,
            condition=condition,
            layout=layout,
            cache=cache,
            visible=visible,
        )

    def _spatial_pos_embed(self, rows: int, columns: int, scale: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        if self.pos_embed is not None:
            return self.pos_embed(rows, columns)
        return spatial_pos_embed(rows, columns, self.config.hidden_size, scale)

    def _position_scale(self, grid: tuple[int, int, int]) -> tuple[float, float, float]:
        """Distances of neighbouring tokens in time, y and x: 1, or the trained size over this size."""
        if self.config.pos_scaling == "none":
            return (1.0, 1.0, 1.0)
        t, y, x = (size // patch for size, patch in zip(self.config.sample_size, self.patch_size, strict=True))
        return (1.0 if self.config.causal else t / grid[0], y / grid[1], x / grid[2])  # with a cache, frames count on

    def _output(self, prediction: Tensor) -> Tensor:
        """Apply the final convolution to every frame if there is one (U-ViT)."""
        if self.final_conv is None:
            return prediction
        frames = prediction.shape[2]
        images = self.final_conv(prediction.transpose(1, 2).flatten(0, 1))
        return images.unflatten(0, (-1, frames)).transpose(1, 2)

    def _call_block(self, block: nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def _after_history(history: Tensor, timestep: Tensor) -> Tensor:
    """Timesteps (B,) or (B, T) of the noisy frames after those of their history (B, T) -> (B, 2 T)."""
    return torch.cat([history, timestep.view(len(history), -1).expand_as(history)], dim=1)


register_cacheable_blocks(BLOCK_CLASSES)

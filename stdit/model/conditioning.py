"""Embeds a timestep and conditions for the blocks, as one vector per frame or as tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stdit.conditions import Conditioner, Conditions, Tokens
from stdit.conditions.values import Value
from stdit.model.trunks import Trunk
from stdit.nn.conditioning import Conditioning
from stdit.nn.modulation import Condition


class TakesConditions:
    """Mixin that gathers the conditions of a model's call, given by name or by keyword."""

    conditioners: dict[str, Conditioner]

    def gather_conditions(
        self, batch: int, conditions: Mapping[str, Value] | None = None, **keywords: Any
    ) -> Conditions:
        """Collect conditions by name (`conditions`) and by keyword (class_labels=, captions=, ...), and add defaults.

        Raises ValueError for a condition that the model does not have, and for a missing one without default.
        """
        found, given = dict(conditions or {}), {key: value for key, value in keywords.items() if value is not None}
        for name, conditioner in self.conditioners.items():
            arguments = [given.pop(key, None) for key in conditioner.keywords]
            if arguments[0] is not None:
                found[name] = conditioner.value(*arguments)
            if name not in found and (default := conditioner.default(batch)) is not None:
                found[name] = default
        given.pop("class_labels", None)  # an unconditional model ignores labels
        unknown = [*(name for name in found if name not in self.conditioners), *given]
        if unknown:
            has = ", ".join(self.conditioners) or "none"
            raise ValueError(
                f"this model takes no {unknown[0]!r}; its conditions are {has}. Leave it out, or train a model with it."
            )
        return found


class ConditionEmbedder(TakesConditions):
    """Mixin that embeds timestep and conditions with the model's embedders, which have DiT's names."""

    config: Any
    conditioning: Conditioning
    trunk: Trunk
    patch_size: tuple[int, int, int]
    t_embedder: nn.Module
    r_embedder: nn.Module | None
    adaLN_single: nn.Sequential | None

    def condition(
        self, timestep: Tensor, conditions: Conditions, batch: int, target_timestep: Tensor | None = None
    ) -> Condition:
        """Embed timestep and conditions, summed to a vector or as tokens.

        timestep: (), (B,), (B, T) or (B, T, S); conditions: completed by `gather_conditions`. target_timestep: where the
        step of a flow map ends, like timestep; None: at timestep. ValueError if the model is no flow map, or, on a CPU,
        for a step that ends above timestep.
        """
        timestep = timestep.expand(batch) if timestep.ndim == 0 else timestep
        time = self.t_embedder(timestep)
        if self.r_embedder is not None:
            time = time + self.r_embedder(_step_length(timestep, target_timestep))
        elif target_timestep is not None:
            raise ValueError("this model is no flow map, so it takes no target_timestep; leave it out.")
        if timestep.ndim > 1 and self.patch_size[0] > 1:  # frames that share a token share a condition
            time = time.unflatten(1, (-1, self.patch_size[0])).mean(2)
        while time.ndim < 4:
            time = time.unsqueeze(-2)
        vectors, tokens, mask = [time], None, None
        for name, conditioner in self.conditioners.items():
            value = conditions.get(name)
            if value is None:
                continue
            embedder = getattr(self, conditioner.module)
            if conditioner.joins == "vector":
                vectors.append(embedder(_on(value, time.device))[:, :, None])
            else:
                assert isinstance(value, Tokens) and tokens is None, "blocks attend to one sequence of tokens only"
                tokens, mask = embedder(_on(value.tokens, time.device).to(time.dtype)), _on(value.mask, time.device)
        pooled = self.trunk.pooled_text_embedding(conditions, time.dtype)
        vectors += [] if pooled is None else [pooled]
        embedding = sum(vectors[1:], vectors[0])
        if not self.conditioning.by_tokens:
            return Condition(
                embedding, None if self.adaLN_single is None else self.adaLN_single(embedding), tokens, mask
            )
        if time.shape[2] > 1:
            raise ValueError(
                f"levels per patch need a vector per patch, but conditioning={self.config.conditioning!r} has one "
                "token per frame. Use conditioning='adaln_zero', or levels per frame (masks of whole frames; in "
                "training objective.mask_probs.region=0)."
            )
        parts = vectors if tokens is None else [*vectors, tokens]
        frames = max(part.shape[1] for part in parts)
        parts = [part.expand(batch, frames, -1, -1) for part in parts]
        if mask is not None:
            ahead = torch.cat(parts[:-1], dim=2)
            mask = torch.cat([mask.new_ones(ahead.shape[:3]), mask.expand(-1, frames, -1)], dim=2)
        return Condition(embedding, None, torch.cat(parts, dim=2), mask)


# By which rounding may put the end of a step above its start, on 0..1000.
_ROUNDING = 1e-2


def _step_length(timestep: Tensor, target_timestep: Tensor | None) -> Tensor:
    """How far below timestep a step ends, like timestep; 0 without a target.

    ValueError for a target of another shape, and for one above timestep, except on devices and in compiled code, where this
    check would wait.
    """
    if target_timestep is None:
        return torch.zeros_like(timestep)
    if target_timestep.ndim and target_timestep.shape != timestep.shape:
        raise ValueError(
            f"target_timestep has the shape {tuple(target_timestep.shape)}, but timestep {tuple(timestep.shape)}; give one for each "
            "of its levels."
        )
    length = timestep - target_timestep
    if torch.compiler.is_compiling() or length.device.type != "cpu":
        return length
    if length.numel() and (least := float(length.detach().min())) < -_ROUNDING:
        raise ValueError(
            f"target_timestep lies above timestep, by up to {-least:g}; a step ends where there is less noise: give at most timestep."
        )
    return length


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

"""How a model turns levels, labels, captions and what else is said of a clip into what its blocks are told."""

from typing import Any

import torch
from torch import Tensor, nn

from stdit.model.trunks import Trunk
from stdit.nn.conditioning import Conditioning
from stdit.nn.modulation import Condition


class ConditionEmbedder:
    """The part of a model that is told. It has the embedders of DiT's names; which exist, its config says."""

    config: Any
    how: Conditioning
    wiring: Trunk
    patch_size: tuple[int, int, int]
    num_classes: int
    t_embedder: nn.Module
    y_embedder: nn.Module | None
    micro_embedder: nn.Module | None
    caption_embedder: nn.Module | None
    adaLN_single: nn.Module | None

    def condition(
        self,
        timestep: Tensor,
        class_labels: Tensor | None,
        batch: int,
        info: Tensor | None = None,
        captions: Tensor | None = None,
        caption_mask: Tensor | None = None,
    ) -> Condition:
        """What blocks are told: embeddings of timestep, label and what else is said of the clip, added, or as tokens."""
        time = self.t_embedder(timestep.expand(batch) if timestep.ndim == 0 else timestep)
        if timestep.ndim > 1 and self.patch_size[0] > 1:  # frames that share a token share a condition
            time = time.unflatten(1, (-1, self.patch_size[0])).mean(2)
        while time.ndim < 4:
            time = time.unsqueeze(-2)
        parts = [time]
        if self.y_embedder is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.num_classes, device=time.device)
            label = self.y_embedder(class_labels)[..., None, :]
            parts.append(label if class_labels.ndim > 1 else label[:, None])
        if self.micro_embedder is not None and info is not None:
            parts.append(self.micro_embedder(info)[:, None, None].to(time))
        words, seen = self._words(captions, caption_mask, time.dtype)
        more = self.trunk.told(captions, caption_mask, time.dtype)
        parts += [] if more is None else [more]
        vector = sum(parts[1:], parts[0])
        if not self.how.by_tokens:
            return Condition(vector, None if self.adaLN_single is None else self.adaLN_single(vector), words, seen)
        if time.shape[2] > 1:
            raise ValueError(
                f"levels by patch need a vector by patch; conditioning={self.config.conditioning!r} has one token a frame. "
                "Use conditioning='adaln_zero', or levels by frame (masks of whole frames; in training objective.mask_probs.region=0)."
            )
        parts += [] if words is None else [words]
        frames = max(part.shape[1] for part in parts)
        parts = [part.expand(batch, frames, -1, -1) for part in parts]
        if seen is not None:
            told = torch.cat(parts[:-1], dim=2)
            seen = torch.cat([seen.new_ones(told.shape[:3]), seen.expand(-1, frames, -1)], dim=2)
        return Condition(vector, None, torch.cat(parts, dim=2), seen)

    def _words(
        self, captions: Tensor | None, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor | None]:
        """Captions (B, T|1, L, D) and their mask (B, T|1, L)."""
        if self.caption_embedder is None:
            if captions is not None:
                raise ValueError("captions are given to a model without caption_channels; train one with them.")
            return None, None
        if captions is None:
            raise ValueError("this model is told captions: give captions, for none those of the empty text.")
        words = self.caption_embedder(captions.to(dtype))
        if mask is not None:
            mask = mask.bool() if mask.ndim > 2 else mask.bool()[:, None]
        return (words if words.ndim > 3 else words[:, None]), mask

"""The target of a flow map: the mean velocity u of the probability flow from levels t to levels r.

A step is x_r = x_t - h u(x_t, t, r) with h = t - r, per frame. For a level s on the straight segment between, the steps
from t to s and from s to r make the step from t to r:

    (t - r) u(x_t, t, r) = (t - s) u(x_t, t, s) + (s - r) u(x_s, s, r)

(Kim et al., "Consistency Trajectory Models"; Boffi et al., "Flow Map Matching"; there t, s and r are numbers). With s near
t, u(x_t, t, s) is the velocity, and the rest is the model's own. MeanFlow is the limit of s to t, and needs the
derivative of the model by its levels, which a trained model does not have in usable form (dev/LOG.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stdit.diffusion.paths import like

# (x, levels, target levels, which clips of the batch (B,) bool) -> the model's mean velocity
MeanVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

STEP = 1 / 32  # length of the first part of a segment, in levels: that of a solver with as many steps


@torch.no_grad()
def mean_velocity(
    model: MeanVelocity, x: Tensor, *, velocity: Tensor, levels: Tensor, target: Tensor, step: float = STEP
) -> Tensor:
    """The target for x (B, C, T, h, w): the velocity for a first part of the segment, then the model's own mean velocity.

    velocity: v at x, like x. levels, target: t and r, (B, T) or (B, T, rows, columns). Clips whose segment is no longer
    than its first part get v.
    """
    length = levels - target
    longest = length.flatten(1).amax(1)
    split = longest > step
    if not bool(split.any()):
        return velocity
    x, v, t, r, h = (part[split] for part in (x, velocity, levels, target, length))
    share = (step / longest[split]).view(-1, *[1] * (t.ndim - 1))
    rest = model(x - like(share * h, x) * v, t - share * h, r, split)
    found = velocity.clone()
    found[split] = like(share, x) * v + (1 - like(share, x)) * rest
    return found

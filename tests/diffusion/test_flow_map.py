"""Flow maps: the target is the mean velocity, segments are rows of sampling plans, and a fresh embedder changes nothing."""

from itertools import pairwise

import pytest
import torch
from conftest import fill

from stdit.conditions import Conditions
from stdit.conditions.guidance import LearntGuidance
from stdit.diffusion.config import ObjectiveConfig
from stdit.diffusion.flow_map import STEP, mean_velocity
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.diffusion.objective import build_objective
from stdit.diffusion.paths import FlowPath, like
from stdit.diffusion.segments import MOST_STEPS, draw_segment
from stdit.model.stdit import STDiT
from stdit.sampling.schedule import Schedule, delayed
from stdit.sampling.solvers import solve
from stdit.training.step import FlowMapTraining, LatentBatch, diffusion_losses

GRID = (5, 4, 4)
COVARIANCE = torch.tensor([[1.0, 0.9, 0.4], [0.9, 1.2, 0.7], [0.4, 0.7, 0.8]], dtype=torch.float64)


def velocity(x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The velocity of the flow for frames that are normal with COVARIANCE, at levels (B, T) of the frames."""
    found = []
    for clip, t in zip(x, levels.double(), strict=True):
        alpha, sigma = 1 - t, t
        total = alpha[:, None] * COVARIANCE * alpha + torch.diag(sigma**2)
        weighted = torch.einsum("st,cthw->cshw", torch.linalg.inv(total), clip)
        clean = torch.einsum("st,cthw->cshw", COVARIANCE * alpha, weighted)
        found.append(sigma[:, None, None] * weighted - clean)
    return torch.stack(found)


def exact(x: torch.Tensor, levels: torch.Tensor, target: torch.Tensor, parts: int = 400) -> torch.Tensor:
    """The mean velocity from levels to target along the straight segment of levels, by many small steps of Heun."""
    y, h = x, levels - target
    for i in range(parts):
        t, t_next = levels - h * (i / parts), levels - h * ((i + 1) / parts)
        first = velocity(y, t)
        euler = y - like(h / parts, y) * first
        y = y - like(h / parts, y) * 0.5 * (first + velocity(euler, t_next))
    return torch.where(like(h, x) > 0, (x - y) / like(h, x).clamp(min=1e-9), velocity(x, levels))


LEVELS = torch.tensor([[0.9, 0.9, 0.9], [0.3, 0.6, 0.95], [0.0, 0.7, 0.95], [0.5, 0.5, 0.5]], dtype=torch.float64)
TARGETS = torch.tensor([[0.2, 0.2, 0.2], [0.1, 0.4, 0.75], [0.0, 0.2, 0.95], [0.5, 0.5, 0.5]], dtype=torch.float64)


def test_the_target_of_an_exact_model_is_its_own_mean_velocity():
    x = torch.randn(4, 2, 3, 2, 2, dtype=torch.float64)
    errors = []
    for step in (STEP, STEP / 2):
        found = mean_velocity(
            lambda x, t, r, _: exact(x, t, r), x, velocity=velocity(x, LEVELS), levels=LEVELS, target=TARGETS, step=step
        )
        moves = (LEVELS > TARGETS) | (LEVELS == TARGETS).all(1, keepdim=True)  # others wait, and have no target
        errors.append(float(((found - exact(x, LEVELS, TARGETS)) * like(moves, x)).abs().max()))
    assert errors[0] < 0.1 and errors[1] < 0.6 * errors[0]  # what is left is the error of the first part


def test_one_step_of_an_exact_flow_map_ends_where_many_steps_do_also_where_frames_start_late():
    path, noise = FlowPath(), torch.randn(1, 2, 3, 2, 2, dtype=torch.float64)

    def mean(x, t, r=None):
        from stdit.diffusion.predictions import from_velocity

        t = t.expand(1, 3).double()
        v = velocity(x, t) if r is None else exact(x, t, r.expand(1, 3).double(), 100)
        return from_velocity(v, x, t)

    for delays in ((0, 0, 0), (0, 1, 2)):  # straight segments of levels follow one another
        few = delayed(torch.linspace(0.98, 0, 3, dtype=torch.float64), torch.tensor(delays))
        parts = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1, None]
        fine = torch.cat([*(a + parts * (b - a) for a, b in pairwise(few)), few[-1:]])
        end = solve(Schedule(noise, few), mean, path, "flow_map")
        torch.testing.assert_close(end, solve(Schedule(noise, fine), mean, path, "heun"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("strategy", sorted(MASK_STRATEGIES))
def test_segments_fall_only_where_something_is_generated_and_known_frames_stand_still(strategy):
    objective = build_objective(ObjectiveConfig(flow_map=True, shift=2.0))
    lengths = []
    for seed in range(200):
        found = objective.sample(torch.Generator().manual_seed(seed), strategy, GRID, tokens=80)
        assert ((found.target >= 0) & (found.target <= found.levels) & (found.levels <= 1)).all()
        assert torch.equal(found.target[~found.mask], found.levels[~found.mask])
        lengths.append(float((found.levels - found.target).max()))
    assert 0.08 < sum(length == 0 for length in lengths) / 200 < 0.3 and max(lengths) > 0.9


def test_segments_of_delayed_frames_are_rows_of_the_plans_of_sampling():
    mask = torch.tensor([False, True, True, True])
    for seed in range(50):
        t, r = draw_segment(torch.Generator().manual_seed(seed), mask, lambda levels: levels, "delayed")
        moving = (t > r) & mask
        assert moving.any()
        assert (t[1:].diff() >= 0).all() and (r[1:].diff() >= 0).all()  # later frames are noisier
        inside = moving & (t < t.max()) & (r > 0)
        assert (t - r)[inside].std(unbiased=False).nan_to_num() < 1e-6  # steps of one plan are of one length


def test_segments_begin_and_end_where_sampling_steps():
    objective = build_objective(ObjectiveConfig(flow_map=True, shift=2.0, sampling_shift=4.0))
    found = [objective.sample(torch.Generator().manual_seed(seed), "shared", GRID, tokens=80) for seed in range(100)]
    plans = [objective.schedule(steps, 80) for steps in range(1, MOST_STEPS + 1)]
    steps = torch.tensor([pair for plan in plans for pair in pairwise(plan.tolist())])
    ends = torch.stack([torch.stack([one.levels[0], one.target[0]]) for one in found])
    whole = (ends[:, None] - steps).abs().amax(2).amin(1) < 1e-6
    # 15 % of clips train the velocity; 15 % of the rest begin below the levels of a plan, as edits do.
    assert 0.6 < whole.float().mean() < 0.9


def build(**changes) -> STDiT:
    arguments = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "in_channels": 4,
        "num_classes": 3,
        "learn_sigma": False,
    }
    torch.manual_seed(0)
    return STDiT(**{**arguments, **changes})


@pytest.mark.parametrize("conditioning", ["adaln_zero", "in_context", "cross_attention", "adaln_single"])
def test_a_fresh_flow_map_gives_what_the_model_gave_bit_for_bit(conditioning):
    model = fill(build(conditioning=conditioning)).eval()
    flow_map = build(conditioning=conditioning, flow_map=True).eval()
    missing = flow_map.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert missing and all(key.startswith("r_embedder.") for key in missing)
    x, t, y = torch.randn(2, 4, 3, 8, 8), torch.rand(2, 3) * 1000, torch.tensor([0, 2])
    expected = model(x, t, y)
    for target in (None, t, 0.5 * t):
        assert torch.equal(flow_map(x, t, y, target_timestep=target), expected)
    with pytest.raises(ValueError, match="no flow map"):
        model(x, t, y, target_timestep=t)


def test_a_step_that_ends_above_its_start_is_refused_where_that_costs_nothing():
    model = build(flow_map=True).eval()
    x, t, y = torch.randn(2, 4, 3, 8, 8), torch.full((2, 3), 500.0), torch.tensor([0, 2])
    above = t.clone()
    above[1, 2] = 750
    with pytest.raises(ValueError, match="target_timestep lies above timestep, by up to 250; .*give at most timestep"):
        model(x, t, y, target_timestep=above)
    with pytest.raises(ValueError, match="by up to 100;"):
        model(list(x), list(t), y, target_timestep=[one + 100 for one in t])
    for other in (t[:, 0], t[:, :2], t[:1]):
        with pytest.raises(
            ValueError, match="target_timestep has the shape .*, but timestep .2, 3.; give one for each"
        ):
            model(x, t, y, target_timestep=other)
    model(x, t, y, target_timestep=t + 1e-4)  # what rounding may do
    model.to("meta")(*(part.to("meta") for part in (x, t, y)), target_timestep=above.to("meta"))


def test_where_a_step_ends_is_embedded_in_one_graph_and_has_a_derivative():
    model = fill(build(flow_map=True)).eval()
    t, y = torch.full((2, 3), 500.0), torch.tensor([[0], [2]])

    def embed(end):
        return model.condition(t, {"label": y}, 2, end).embedding

    compiled = torch.compile(embed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t / 2), embed(t / 2))
    _, tangent = torch.func.jvp(embed, (t / 2,), (torch.ones_like(t),))
    near = (embed(t / 2 + 0.1) - embed(t / 2 - 0.1)) / 0.2
    assert tangent.abs().max() > 1e-3
    torch.testing.assert_close(tangent, near, atol=1e-3, rtol=1e-2)


def test_a_trained_flow_map_answers_to_where_the_step_ends_per_frame_and_per_patch():
    model = fill(build(flow_map=True, axes=["joint"])).eval()
    x, y = torch.randn(2, 4, 3, 8, 8), torch.tensor([0, 2])
    for shape in ((2,), (2, 3), (2, 3, 16)):
        t = 500 + 400 * torch.rand(shape)
        assert not torch.equal(model(x, t, y, target_timestep=t), model(x, t, y, target_timestep=t / 2))
        assert torch.equal(model(x, t, y, target_timestep=t), model(x, t, y))
    lists = model([x[0], x[1]], [t[0, :, 0], t[1, :, 0]], y, target_timestep=[t[0, :, 0] / 2, t[1, :, 0] / 2])
    alone = model(x, t[..., 0], y, target_timestep=t[..., 0] / 2)
    torch.testing.assert_close(torch.stack(lists), alone, atol=1e-5, rtol=1e-5)


def losses(model: STDiT, objective, strategy: str, teacher=None, *, guide=None) -> torch.Tensor:
    latents, labels = torch.randn(4, 4, 5, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 1])
    conditions: Conditions = {"label": labels[:, None]}
    null = {"label": torch.full((4, 1), 3)}
    given = FlowMapTraining(model, null, teacher, guide) if objective.config.flow_map else None
    clips = [LatentBatch(latents, lambda mask: latents.transpose(1, 2)[mask])]
    keys = [(0, 5, slot) for slot in range(4)]
    return diffusion_losses(
        model, objective, clips, conditions, keys, patch=(1, 2, 2), strategy=strategy, flow_map=given
    ).clips


@pytest.mark.parametrize("strategy", sorted(MASK_STRATEGIES))
@pytest.mark.parametrize("taught", [False, True])
def test_every_mask_strategy_trains_a_flow_map_and_its_new_embedder(strategy, taught):
    causal = {"causal": True, "position_encoding": "rope_3d"} if strategy == "teacher_forcing" else {}
    model = fill(build(flow_map=True, axes=["joint"], **causal))
    teacher = fill(build(axes=["joint"], **causal)).requires_grad_(False) if taught else None
    objective = build_objective(ObjectiveConfig(flow_map=True, distilled_guidance=2.0))
    found = losses(model, objective, strategy, teacher)
    assert found.shape == (4,) and torch.isfinite(found).all()
    found.sum().backward()
    assert model.r_embedder.mlp[2].weight.grad.abs().max() > 0


def test_frames_that_wait_while_others_move_have_no_weight_in_the_loss():
    model, objective = fill(build(flow_map=True, axes=["joint"])), build_objective(ObjectiveConfig(flow_map=True))
    clips = [LatentBatch(torch.randn(16, 4, 5, 8, 8))]
    conditions, null = ({"label": torch.full((16, 1), label)} for label in (1, 3))
    waiting = []

    def loss(changes):
        def changed(x, timestep, *, target_timestep, **given):
            moves = timestep > target_timestep
            waits = ~moves & (timestep > 0) & moves.any(1, keepdim=True)
            waiting.append(int(waits.sum()))
            where = waits if changes == "waiting" else moves & (changes == "moving")
            return model(x, timestep, target_timestep=target_timestep, **given) + like(100.0 * where, x)

        given = {"patch": (1, 2, 2), "strategy": "per_frame", "flow_map": FlowMapTraining(model, null)}
        keys = [(0, 5, slot) for slot in range(16)]
        return diffusion_losses(changed, objective, clips, conditions, keys=keys, **given).clips

    expected = loss("nothing")
    assert torch.equal(loss("waiting"), expected) and min(waiting) > 5
    assert (loss("moving") > expected).sum() > 8


@pytest.mark.parametrize("learns", ["the data", "a teacher", "scales of a teacher"])
def test_a_flow_map_has_the_same_loss_in_packed_clips_as_in_single_ones(learns):
    guidance = LearntGuidance({"cfg": 5.0, "auto": 3.0})
    extra = {"extra_conditions": {"guidance": {"scales": guidance.scales}}} if "scales" in learns else {}
    model = fill(build(flow_map=True, axes=["joint"], **extra))
    teacher, guide = (
        fill(build(axes=["joint"]), scale).requires_grad_(False) if "teacher" in learns else None
        for scale in (0.1, 0.2)
    )
    learnt = {"distilled_scales": guidance.scales} if extra else {"distilled_guidance": 2.0}
    objective = build_objective(ObjectiveConfig(flow_map=True, **learnt))
    clips = [LatentBatch(torch.randn(1, 4, *shape)) for shape in [(5, 4, 4), (2, 4, 8), (1, 8, 4), (2, 4, 4)]]
    labels, nulls = torch.tensor([[0], [2], [1], [2]]), torch.tensor([[3]])
    keys = [(0, 5, slot) for slot in range(4)]
    scales = torch.tensor([[1.0, 4.0], [2.5, 1.0], [1.0, 1.0], [3.0, 2.0]])[:, None]

    def loss(which: slice) -> torch.Tensor:
        conditions = {"label": labels[which], **({"guidance": scales[which]} if extra else {})}
        null = {**conditions, "label": nulls.expand(len(keys[which]), 1)}
        given = FlowMapTraining(model, null, teacher, guide)
        options = {"patch": (1, 2, 2), "strategy": "per_frame", "flow_map": given}
        return diffusion_losses(model, objective, clips[which], conditions, keys=keys[which], **options).clips

    single = torch.cat([loss(slice(i, i + 1)) for i in range(4)])
    torch.testing.assert_close(loss(slice(0, 4)), single, atol=1e-5, rtol=1e-4)


def test_the_guide_of_the_teacher_is_what_its_guidance_leads_away_from():
    model, teacher = fill(build(flow_map=True)), fill(build()).requires_grad_(False)
    plain, guided = (
        build_objective(ObjectiveConfig(flow_map=True, **learnt))
        for learnt in ({}, {"distilled_guider": "auto", "distilled_guidance": 3.0})
    )
    alone = losses(model, plain, "shared", teacher)
    # The guide sees some of the clips, so sums differ by rounding, which a difference along the path enlarges.
    near = {"atol": 1e-5, "rtol": 1e-3}
    torch.testing.assert_close(losses(model, guided, "shared", teacher, guide=teacher), alone, **near)
    worse = fill(build(), 0.2).requires_grad_(False)
    assert not torch.allclose(losses(model, guided, "shared", teacher, guide=worse), alone, **near)


def test_where_no_segment_has_a_length_the_loss_is_that_of_flow(monkeypatch):
    from stdit.diffusion import objective as module

    monkeypatch.setattr(module, "VELOCITY_SHARE", 1.1)
    model = build(axes=["joint"])
    flow_map = build(axes=["joint"], flow_map=True)
    flow_map.load_state_dict(fill(model).state_dict(), strict=False)
    expected = losses(model, build_objective(ObjectiveConfig(shift=2.0)), "shared")
    assert torch.equal(losses(flow_map, build_objective(ObjectiveConfig(shift=2.0, flow_map=True)), "shared"), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "ddpm", "flow_map": True}, "flow_map=true does not go with objective.name=ddpm"),
        ({"flow_map": True, "mask_ratio": 0.3}, "does not go with objective.mask_ratio=0.3"),
        ({"distilled_guidance": 3.0}, "no effect without objective.flow_map=true"),
        (
            {"flow_map": True, "distilled_guidance": 0.5},
            r"distilled_guidance.* \[1, inf\)|distilled_guidance must be >= 1",
        ),
    ],
)
def test_a_flow_map_that_cannot_be_trained_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**given)

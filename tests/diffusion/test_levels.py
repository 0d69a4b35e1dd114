import pytest
import torch

from stdit.diffusion.config import DEFAULT_MASK_PROBS
from stdit.diffusion.masks import MASK_STRATEGIES, choose_strategy
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.rng import keyed_generator

GRID = (5, 4, 4)


def drawn(scheme, count=200, grid=GRID, **config):
    objective = build_objective(ObjectiveConfig(mask_strategy=scheme, **config))
    return [objective.sample(keyed_generator("levels", 0, i, 0), scheme, grid, 320) for i in range(count)]


def masks(scheme, **kwargs):
    return {tuple((~one.mask).flatten().tolist()) for one in drawn(scheme, **kwargs)}


def test_frames_share_a_level_or_each_has_its_own():
    assert all(len(one.levels.unique()) == 1 for one in drawn("shared"))
    assert all(len(one.levels.unique()) == 5 for one in drawn("per_frame"))


def test_teacher_forcing_gives_each_frame_the_earlier_frames_at_the_known_level():
    for one in drawn("teacher_forcing", cond_noise_max=0.2):
        assert one.mask.all()
        assert len(one.levels.unique()) == 5
        assert 0 <= one.history < 0.2
    assert all(one.history is None for one in drawn("prefix"))


@pytest.mark.parametrize("scheme", sorted(set(MASK_STRATEGIES) - {"shared", "per_frame", "teacher_forcing"}))
@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_known_frames_are_at_level_0_and_some_frames_are_to_be_generated(scheme, objective):
    for one in drawn(scheme, name=objective):
        assert (one.levels[~one.mask] == 0).all()
        assert (one.levels[one.mask] > 0).all()
        assert one.mask.any()
        assert len(one.levels[one.mask].unique()) == 1


def test_each_mask_strategy_has_the_known_frames_that_its_name_says():
    everything = {tuple(t < n for t in range(5)) for n in range(1, 5)}
    assert masks("prefix") == everything
    assert masks("suffix") == {mask[::-1] for mask in everything}
    assert masks("motion") == {mask for mask in everything if mask[1]}
    assert masks("every_kth") == {tuple(t % k == 0 for t in range(5)) for k in (2, 3, 4, 5)}
    gaps = {(b, e) for b in range(1, 4) for e in range(b + 1, 5)}
    assert masks("ends", count=400) == {tuple(not b <= t < e for t in range(5)) for b, e in gaps}
    assert len(masks("random", count=600)) == 2**5 - 1


def test_regions_are_a_box_or_all_but_a_box_in_all_frames_or_some():
    shapes = {one.mask.shape for one in drawn("region")}
    assert shapes == {GRID}
    made = [one.mask for one in drawn("region", 400)]
    assert any(m.any(2).any(1).all() for m in made)
    assert any(not m.any(2).any(1).all() for m in made)


@pytest.mark.parametrize("scheme", sorted(MASK_STRATEGIES))
def test_an_image_has_no_known_frames(scheme):
    if scheme != "region":
        assert not any((~one.mask).any() for one in drawn(scheme, grid=(1, 4, 4)))


@pytest.mark.parametrize(
    "shares", [DEFAULT_MASK_PROBS, {"region": 0.6, "shared": 0.4}, {"region": 1.0}, {"prefix": 1.0}], ids=len
)
def test_mask_strategies_are_as_frequent_as_their_probabilities(shares):
    picked = [choose_strategy((0, step, slot), shares) for step in range(500) for slot in range(16)]
    assert set(picked) == set(shares)
    for name, share in shares.items():
        assert picked.count(name) / len(picked) == pytest.approx(share / sum(shares.values()), abs=0.02)


def test_most_steps_have_known_frames_and_per_patch_clips_are_in_few_steps():
    steps = [{choose_strategy((0, step, slot), DEFAULT_MASK_PROBS) for slot in range(16)} for step in range(500)]
    assert sum(step != {"shared"} for step in steps) > 0.7 * 500
    assert (
        0.03 * 500 < sum("region" in step for step in steps) < 0.1 * 500
    )  # without grouping, a probability of 0.015 is in a fifth of the steps


def test_known_frames_can_have_noise_and_are_still_not_predicted():
    levels = torch.cat([one.levels[~one.mask] for one in drawn("prefix", cond_noise_max=0.2)])
    assert 0 < levels.min() < levels.max() <= 0.2


def test_known_frames_can_begin_after_warmup_steps():
    config = ObjectiveConfig(mask_strategy="mixed", mask_probs={"prefix": 3.0, "shared": 1.0}, mask_warmup_steps=100)
    assert config.mask_probs_at(99) == {"shared": 1.0}
    assert config.mask_probs_at(100) == {"prefix": 0.75, "shared": 0.25}


def test_cond_timestep_shift_raises_the_levels_of_clips_with_known_frames():
    plain, shifted = (
        torch.stack([one.levels[one.mask][0] for one in drawn("prefix", cond_timestep_shift=shift)])
        for shift in (1.0, 8.0)
    )
    torch.testing.assert_close(shifted, 8 * plain / (1 + 7 * plain))
    unknown = [
        torch.stack([one.levels[0] for one in drawn("shared", cond_timestep_shift=shift)]) for shift in (1.0, 8.0)
    ]
    assert torch.equal(*unknown)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mask_strategy": "prefx"}, "Did you mean 'prefix'"),
        ({"mask_probs": {"sufix": 1.0}}, "Did you mean 'suffix'"),
        ({"mask_probs": {"prefix": -1.0}}, r"objective.mask_probs.prefix must be >= 0 and finite, got -1.0"),
        ({"mask_probs": {"prefix": 0.0}}, "are all 0"),
        ({"cond_noise_max": 1.0}, "cond_noise_max must be in .* got 1.0"),
    ],
)
def test_invalid_mask_strategies_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**config)


def test_teacher_forcing_cannot_be_mixed_with_other_strategies():
    with pytest.raises(
        ValueError,
        match="mask_probs.teacher_forcing gives every clip a noised history .* use objective.mask_strategy=teacher_forcing",
    ):
        ObjectiveConfig(mask_strategy="mixed", mask_probs={"teacher_forcing": 0.5, "shared": 0.5})
    assert ObjectiveConfig(
        mask_strategy="mixed", mask_probs={"teacher_forcing": 0.5, "shared": 0.0}
    ).active_mask_probs == {"teacher_forcing": 1.0}

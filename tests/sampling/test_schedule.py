import pytest
import torch

from stdit.diffusion.paths import DDPMPath, FlowPath
from stdit.diffusion.predictions import Estimate
from stdit.sampling.schedule import ARRANGEMENTS, Schedule, check, make_schedule
from stdit.sampling.solvers import SOLVERS, solve

MASKS = {
    "all": torch.ones(6, dtype=torch.bool),
    "after": torch.tensor([0, 0, 1, 1, 1, 1]).bool(),
    "between": torch.tensor([0, 1, 1, 0, 1, 0]).bool(),
    "patches": torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("path", [FlowPath(), DDPMPath()], ids=lambda p: p.name)
def test_levels_fall_to_0_and_known_columns_are_0_throughout(mask, arrangement, every, path):
    levels = make_schedule(path.schedule(7), mask, arrangement, chunk_size=every, stagger=every)
    check(Schedule(torch.zeros(1, 1, 6, 2, 2), levels))
    assert (levels[:, ~mask] == 0).all()
    assert (levels[0, mask] == 1).all()  # every frame to be generated starts from noise


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_known_latents_never_move_by_a_bit(mask, arrangement, solver):
    path = DDPMPath() if solver == "ddpm" else FlowPath()
    x = torch.randn(2, 3, 6, 4, 4)
    schedule = Schedule(x, make_schedule(path.schedule(5), mask, arrangement))
    end = solve(schedule, lambda x, *_: Estimate(torch.randn_like(x), torch.randn_like(x)), path, solver)
    known = ~mask.view(6, *mask.shape[1:], *[1] * (3 - mask.ndim)).expand(6, 2, 2)
    known = known.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(end[:, :, known], x[:, :, known])
    assert not (end == x)[:, :, ~known].any()


def test_chunks_begin_when_the_chunk_before_is_clean():
    levels = make_schedule(FlowPath().schedule(3), MASKS["all"], "autoregressive", chunk_size=2)
    assert len(levels) == 3 * 3 + 1
    for t in range(2, 6):
        assert (levels[levels[:, t] < 1, t - 2] == 0).all()


def test_a_pyramid_starts_each_frame_some_steps_after_its_neighbour():
    levels = make_schedule(FlowPath().schedule(8), MASKS["after"], "pyramid", stagger=3)
    started = (levels[:, 2:] < 1).int().argmax(0)
    assert started.diff().tolist() == [3, 3, 3]


def test_impossible_arrangements_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'pyramid'"):
        make_schedule(FlowPath().schedule(3), MASKS["all"], "pyramyd")
    with pytest.raises(ValueError, match="stagger must be >= 1, got 0"):
        make_schedule(FlowPath().schedule(3), MASKS["all"], "pyramid", stagger=0)

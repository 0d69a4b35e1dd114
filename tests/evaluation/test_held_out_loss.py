"""The loss by mask strategy shows whether a model uses known frames."""

import pytest
import torch
from conftest import fill

from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.evaluation.held_out import held_out
from stdit.model.stdit import STDiT
from stdit.recipes import held_out_loss
from stdit.recipes.held_out_loss import losses_by_strategy
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import load_vae

DATA = held_out(4, 5, "straight", 32, seed=0)


@pytest.fixture
def pipe():
    model = fill(STDiT(depth=1, hidden_size=32, num_heads=4, in_channels=16, learn_sigma=False, num_classes=0))
    return STDiTPipeline(model.eval(), load_vae("tiny"), STDiTScheduler("flow"), 5, 32, 32, 8.0, "flow")


def test_each_strategy_has_a_loss_at_each_level_and_twice_the_same(pipe):
    found = losses_by_strategy(pipe, DATA, [0.3, 0.9])
    assert set(found) == set(MASK_STRATEGIES) - {"per_frame", "teacher_forcing"}
    assert all(len(losses) == 2 and min(losses) > 0 for losses in found.values())
    assert losses_by_strategy(pipe, DATA, [0.3, 0.9]) == found
    assert losses_by_strategy(pipe, DATA, [0.3])["prefix"] == found["prefix"][:1]


def test_an_output_given_known_frames_changes_the_losses_with_known_frames_alone(pipe):
    plain = losses_by_strategy(pipe, DATA, [0.5])
    forward = type(pipe.transformer).forward

    def zero_with_known(self, x, timestep, **conditions):  # levels per frame: some frames are known
        return forward(self, x, timestep, **conditions) if timestep.ndim == 1 else torch.zeros_like(x)

    pipe.transformer.forward = zero_with_known.__get__(pipe.transformer)
    other = losses_by_strategy(pipe, DATA, [0.5])
    assert other["shared"] == plain["shared"]
    assert other["prefix"] != plain["prefix"]


def test_the_tool_prints_a_row_per_strategy_and_refuses_invalid_levels(pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "m")
    assert held_out_loss.main([str(tmp_path / "m"), "--clips", "2", "--levels", "0.5"]) == 0
    assert "\nprefix" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--levels must be > 0 and <= 1"):
        held_out_loss.main([str(tmp_path / "m"), "--levels", "0"])
    with pytest.raises((ValueError, OSError)):
        held_out_loss.main([str(tmp_path / "none")])

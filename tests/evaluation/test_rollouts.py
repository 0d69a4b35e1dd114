"""Long rollouts: what is measured of them."""

import pytest
import torch

from stdit.evaluation.held_out import held_out
from stdit.evaluation.rollouts import rollout
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae.tiny import TinyVAE


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
def test_a_rollout_is_measured_at_its_end_with_the_time_of_the_network_apart(tiny_model):
    network = tiny_model(
        in_channels=16, num_classes=0, learn_sigma=False, axes=["joint"], causal=True, position_encoding="rope_3d", window=2
    )  # fmt: skip
    vae = TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))
    pipe = STDiTPipeline(network, vae, STDiTScheduler("flow", learn_sigma=False), 9, 32, 32, 8.0, "flow")
    result = rollout(pipe, held_out(2, 9, "bounce", 32, seed=1), 5, 24, num_inference_steps=1, seed=1, progress=False)
    found = {metric.name.removeprefix("rollout of 24 frames: "): metric.value for metric in result.metrics}
    assert found["of these in the network, without decoding"] > 0
    assert 0 <= found["shape and colour right at the end"] <= 1
    assert result.clips[0].shape[1:] == (32, 32, 3)
    assert not network._forward_pre_hooks and not network._forward_hooks

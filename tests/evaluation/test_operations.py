"""Metrics of tasks on outputs of known quality: the truth, and a still clip."""

from types import SimpleNamespace

import pytest
import torch

from stdit.data.shapes import CLASS_NAMES
from stdit.evaluation import operations as op

DATA = op.held_out(12, 17, "straight", 64, seed=5)


class FixedOutput:
    """A pipeline whose tasks all return the clips of its constructor."""

    transformer = SimpleNamespace(config=SimpleNamespace(class_names=CLASS_NAMES))

    def __init__(self, clips):
        self.clips = clips

    def extend(self, *_, **__):
        return self.clips

    connect = interpolate = edit = extend


def still():
    return FixedOutput(DATA.pixels[:, :, :1].expand_as(DATA.pixels).clone())


def by_name(result):
    return {metric.name.split(": ")[1]: metric for metric in result.metrics}


@pytest.mark.parametrize("backward", [False, True])
def test_the_truth_reaches_every_metric_of_an_extension_and_a_still_clip_does_not(backward):
    known = 8 if backward else 5
    right = by_name(op.extension(FixedOutput(DATA.pixels), DATA, known, backward=backward, max_error=2.0))
    assert all(metric.reached in (True, None) for metric in right.values())
    assert right["mean position error at the end"].value < 0.1
    wrong = by_name(op.extension(still(), DATA, known, backward=backward, max_error=2.0))
    assert wrong["direction kept"].value == 0
    if not backward:
        assert wrong["mean position error at the end"].value > 5


def test_a_connection_is_measured_over_its_gap_and_at_its_seam():
    right = by_name(op.connection(FixedOutput(DATA.pixels), DATA, 5, 4, max_error=1.5))
    assert right["position error at the seam"].value < 0.1
    assert by_name(op.connection(still(), DATA, 5, 4, max_error=1.5))["position error at the seam"].reached is False


def test_interpolation_is_measured_against_linear_blending():
    linear = DATA.pixels.clone()
    linear[:, :, 1::2] = (DATA.pixels[:, :, 0:-1:2] + DATA.pixels[:, :, 2::2]) / 2
    same = by_name(op.interpolation(FixedOutput(linear), DATA, 2))
    assert same["PSNR above linear blending"].value == pytest.approx(0, abs=1e-4)
    assert by_name(op.interpolation(FixedOutput(DATA.pixels), DATA, 2))["PSNR above linear blending"].value > 20


def test_a_metric_has_the_value_of_each_clip_in_order():
    clips = DATA.pixels.clone()
    clips[4] = -clips[4]

    class Inpainted(FixedOutput):
        def inpaint(self, pixels, mask, **options):  # which has every fourth clip
            return torch.stack([-one if torch.equal(one, DATA.pixels[4]) else one for one in pixels])

    linear = torch.rand(DATA.pixels.shape, generator=torch.Generator().manual_seed(0))
    results = [
        op.extension(FixedOutput(clips), DATA, 5, backward=False, max_error=2.0),
        op.connection(FixedOutput(clips), DATA, 5, 4, max_error=1.5),
        op.editing(FixedOutput(clips), DATA, 0.3, min_share=0.9, new_label=False),
        op.interpolation(FixedOutput(linear), DATA, 2),
        op.inpainting(Inpainted(clips), DATA),
    ]
    for metric in (metric for result in results for metric in result.metrics if metric.values is not None):
        assert len(metric.values) == 12
        if metric.unit != "dB":
            assert metric.value == pytest.approx(sum(metric.values) / 12)
    assert [i for i, same in enumerate(results[2].metrics[0].values) if not same] == [4]
    assert [i for i, one in enumerate(results[4].metrics[1].values) if one < 30] == [4]


def test_an_edit_without_changes_keeps_the_shape_and_does_not_follow_the_label():
    assert op.editing(FixedOutput(DATA.pixels), DATA, 0.3, min_share=0.9, new_label=False).metrics[0].value == 1
    assert op.editing(FixedOutput(DATA.pixels), DATA, 0.8, min_share=0.8, new_label=True).metrics[0].value == 0


def test_held_out_clips_are_not_training_clips():
    from stdit.data.shapes import random_clip
    from stdit.rng import keyed_rng

    drawn = [random_clip(keyed_rng("sample", 5, i), i, 17, 64, "straight").start for i in range(12)]
    assert not any(truth.start in drawn for truth in DATA.truths)
    same = op.held_out(12, 17, "straight", 64, seed=5)
    assert torch.equal(same.pixels, DATA.pixels)


def test_metrics_print_their_target_and_whether_it_was_reached():
    assert "MISSED" in str(op.Metric("a", 0.5, "%", least=0.9))
    assert "reached" in str(op.Metric("a", 1.5, "px", most=2.0))
    assert "reached" not in str(op.Metric("a", 1.5, "px"))
    assert ">= 90%" in str(op.Metric("a", 0.5, "%", least=0.9)) and "<= 2 " in str(op.Metric("a", 1.5, "px", most=2.0))

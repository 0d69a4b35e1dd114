import numpy as np
import pytest

from stdit.data.config import DataConfig
from stdit.data.datasets import MovingShapes
from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES, draw, random_clip
from stdit.rng import keyed_rng


@pytest.mark.parametrize("label", range(12))
@pytest.mark.parametrize("motion", ["straight", "bounce"])
def test_the_object_stays_clear_of_the_border(label, motion):
    for seed in range(20):
        clip = random_clip(keyed_rng("sample", seed), label, frames=60 if motion == "bounce" else 17, motion=motion)
        frames = draw(clip)
        edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        assert (edge == np.round(np.array(clip.background) * 255).astype(np.uint8)).all()


def test_classes_are_three_shapes_times_four_directions():
    assert len(CLASS_NAMES) == 12
    assert [random_clip(keyed_rng("sample", 0), i).label for i in range(12)] == list(range(12))


def test_bouncing_objects_are_reflected_at_constant_speed():
    clip = random_clip(keyed_rng("sample", 3), 1, frames=200, motion="bounce")
    steps = np.diff(clip.centers()[:, 0])
    assert (steps > 0).any()
    assert (steps < 0).any()
    assert np.quantile(np.abs(steps), 0.9) == pytest.approx(clip.speed, rel=1e-6)


def test_all_shapes_have_the_same_area():
    areas = []
    for label in (0, 4, 8):
        clip = random_clip(keyed_rng("sample", 1), label)
        clip.size, clip.color, clip.background = 8.0, [1.0] * 3, [0.0] * 3
        areas.append(draw(clip)[0, :, :, 0].sum() / 255)
    assert np.ptp(areas) / np.mean(areas) < 0.03


def test_an_unknown_motion_is_refused():
    with pytest.raises(ValueError, match="motion='jump' is unknown"):
        random_clip(keyed_rng("sample", 0), motion="jump")


def test_bouncing_objects_are_labelled_by_colour_and_shape():
    data = MovingShapes(DataConfig(source="shapes", num_frames=9, height=32, width=32, num_shapes=24, motion="bounce"))
    assert data.num_classes == len(OBJECT_NAMES) == 24
    for i in range(24):
        clip = data._clip(i, data._size)
        assert data.class_names[data.label(i)] == f"{clip.color_name} {clip.shape}"
        assert data.record(i)["caption"].endswith(f"{clip.color_name} {clip.shape} bounces")

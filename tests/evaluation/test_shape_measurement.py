import numpy as np
import pytest

from stdit.data.shapes import draw, random_clip
from stdit.evaluation.shapes import measure_shape, report, table, wilson
from stdit.rng import keyed_rng


def test_drawn_clips_are_measured_as_they_were_drawn():
    clips = [random_clip(keyed_rng("sample", 7, i), i % 12) for i in range(240)]
    frames = [draw(clip) for clip in clips]
    result = report(frames, [clip.label for clip in clips])
    assert result.shape == result.direction == result.both == result.fill == result.clean == 1.0
    for clip, drawn in zip(clips, frames, strict=True):
        measured = measure_shape(drawn)
        assert np.hypot(*(measured.centers[0] - clip.start)) < 0.5
        assert measured.speed == pytest.approx(clip.speed, abs=0.05)
        assert np.abs(measured.color - clip.color).max() < 0.03
        assert measured.bend < 0.1


def test_wrong_clips_are_measured_as_wrong():
    clip = random_clip(keyed_rng("sample", 1), 0)
    frames = draw(clip)
    assert measure_shape(frames[::-1]).direction == "right"
    assert measure_shape(frames.swapaxes(1, 2)).direction == "up"
    assert measure_shape(np.repeat(frames[:1], 17, axis=0)).direction is None
    assert measure_shape(np.full_like(frames, 90)).shape is None
    rng = np.random.default_rng(0)
    assert measure_shape(rng.integers(0, 255, frames.shape, dtype=np.uint8)).shape is None
    shuffled = measure_shape(frames[rng.permutation(17)])
    assert shuffled.unevenness > 1


def test_a_second_object_of_another_colour_is_detected():
    clip = random_clip(keyed_rng("sample", 3), 1)
    clip.color, clip.background = [0.9, 0.1, 0.1], [0.1, 0.1, 0.1]
    alone = draw(clip)
    both = alone.copy()
    both[:, 2:14, 2:14] = [10, 250, 120]
    assert report([alone], [1]).clean == 1
    assert report([both], [1]).clean == 0
    assert measure_shape(alone).strange < 0.02 < measure_shape(both).strange


def test_a_second_object_of_the_same_colour_is_detected():
    clip = random_clip(keyed_rng("sample", 3), 1)
    alone = draw(clip)
    both = alone.copy()
    both[5, 2:7, 2:7] = np.round(255 * np.array(clip.color))
    assert report([alone], [1]).clean == 1
    assert report([both], [1]).clean == 0
    assert (measure_shape(alone).second, measure_shape(both).second) == (0, 25)


def test_horns_change_the_shape_by_fill_and_not_the_shape_by_outline():
    clip = random_clip(keyed_rng("sample", 8), 5)  # a square
    clip.color, clip.background, clip.size = [0.9, 0.1, 0.1], [0.1, 0.1, 0.1], 11.0
    ragged = draw(clip)
    for frame, (x, y) in zip(ragged, clip.centers().round().astype(int), strict=True):
        frame[y - 13 : y - 8, x - 13 : x - 9] = [230, 26, 26]
    smooth, horned = measure_shape(draw(clip)), measure_shape(ragged)
    assert (smooth.shape, smooth.shape_by_fill) == ("square", "square") and smooth.fill > 0.97
    assert (horned.shape, horned.shape_by_fill) == ("square", "circle") and horned.misfit > smooth.misfit


def test_a_bent_path_is_measured():
    clip = random_clip(keyed_rng("sample", 5), 1)
    frames = draw(clip).copy()
    for i in range(17):
        frames[i] = np.roll(frames[i], round(3 * np.sin(i)), axis=0)
    assert measure_shape(frames).bend > 1.5


def test_intervals_hold_the_share_and_narrow_with_more_clips():
    few, many = wilson(np.array([1] * 9 + [0])), wilson(np.array(([1] * 9 + [0]) * 50))
    assert few[0] < many[0] < 0.9 < many[1] < few[1]


def test_a_report_without_clips_is_refused():
    with pytest.raises(ValueError, match="0 clips and 1 labels"):
        report([], [3])
    clip = random_clip(keyed_rng("sample", 5), 1)
    assert "circle right" in table(report([draw(clip)], [1]))

import pytest

from stdit.data.shapes import COLORS, SHAPES, draw, random_clip
from stdit.evaluation.captions import caption, caption_accuracy, caption_grid
from stdit.rng import keyed_rng


def test_drawn_clips_match_their_own_captions_and_no_others():
    drawn = [random_clip(keyed_rng("sample", 3, i), i % 12) for i in range(36)]
    clips = [draw(clip) for clip in drawn]
    combinations = [(clip.color_name, clip.shape, clip.direction) for clip in drawn]
    assert [caption(*one) for one in combinations] == [clip.caption for clip in drawn]
    result = caption_accuracy(clips, combinations)
    assert result.all == 1 and result.clips == 36
    swapped = caption_accuracy(clips, [("pink" if c != "pink" else "red", s, d) for c, s, d in combinations])
    assert swapped.color == 0 and swapped.shape == swapped.direction == 1


def test_a_caption_grid_is_spread_over_all_or_over_some_pairs():
    grid = caption_grid(None, len(COLORS) * len(SHAPES) * 4)
    assert len(set(grid)) == len(grid)
    assert {one[:2] for one in caption_grid(["red circle"], 8)} == {("red", "circle")}


@pytest.mark.parametrize(("words", "text"), [(("red", "circle", "left"), "a red circle moves left"), (("orange", "square", "up"), "an orange square moves up")])  # fmt: skip
def test_captions_are_english(words, text):
    assert caption(*words) == text

import numpy as np

from stdit.data.video_write import contact_sheet


def _clips(count):
    return [np.full((9, 32, 32, 3), 40 * i, np.uint8) for i in range(count)]


def test_names_stand_above_their_strips_and_change_no_frame():
    plain, named = contact_sheet(_clips(3), 2), contact_sheet(_clips(3), 2, names=["circle left", "", "größer"])
    line = (len(named) - len(plain)) // 2
    strip = len(plain) // 2
    for row in range(2):
        begin = row * (line + strip)
        assert np.array_equal(named[begin + line : begin + line + strip], plain[row * strip : (row + 1) * strip])
        assert (named[begin : begin + line, : plain.shape[1] // 2] < 128).any()
    assert (named[:line, plain.shape[1] // 2 :] == 255).all()  # a clip without a name


def test_a_name_that_does_not_fit_is_cut_and_control_characters_are_shown():
    sheets = [contact_sheet(_clips(1), names=[name]) for name in ("x" * 500, "x" * 600, "a\x1b[31mb\nc")]
    assert len({sheet.shape for sheet in sheets}) == 1
    assert np.array_equal(sheets[0], sheets[1])


def test_sheets_without_names_are_as_before():
    assert np.array_equal(contact_sheet(_clips(2), names=["", ""]), contact_sheet(_clips(2)))

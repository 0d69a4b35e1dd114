import numpy as np
import pytest
import torch
from conftest import fill

from stdit.model.stdit import STDiT
from stdit.nn.cache import FrameCache
from stdit.nn.layout import AXES
from stdit.nn.packed import PackedLayout
from stdit.nn.positions import apply_rope, rope_freqs


def causal(axes, window, entry="rope", **changes):
    arguments = {"depth": 3, "hidden_size": 32, "num_heads": 4, "in_channels": 4, "num_classes": 3, "qk_norm": True,
                 "sample_size": (6, 4, 4), **changes}  # fmt: skip
    return fill(STDiT(**arguments, axes=axes, causal=True, window=window, position_encoding=entry), 0.1).eval()


def inputs(frames=6):
    return torch.randn(2, 4, frames, 4, 4), torch.rand(2, frames) * 1000, torch.tensor([0, 2])


@pytest.mark.parametrize("axes", [["joint"], ["spatial", "temporal"]], ids="-".join)
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (2, 0), (3, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("entry", ["rope", "rope_3d"])
@torch.no_grad()
def test_frame_by_frame_with_a_cache_equals_all_frames_at_once(axes, window, sink, entry):
    model, (x, t, labels), cache = causal(axes, window, entry, sink=sink), inputs(), FrameCache(window, sink)
    whole, parts, sizes = model(x, t, labels), [], []
    for i in range(6):
        frame = (x[:, :, i : i + 1], t[:, i : i + 1], labels)
        parts.append(model(*frame, cache=cache))  # without writing, a frame can be called any number of times
        cache.writing = True
        model(*frame, cache=cache)
        cache.writing = False
        sizes.append(cache.bytes())
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)
    if window:
        assert len(set(sizes[window - 2 + sink :])) == 1  # memory stops growing at the window


@pytest.mark.parametrize("axes", [["joint"], ["spatial", "temporal"]], ids="-".join)
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (3, 0), (3, 1)])
@torch.no_grad()
def test_teacher_forcing_equals_the_cache_of_the_clean_frames_before(axes, window, sink):
    model, (x, t, labels), cache = causal(axes, window, sink=sink), inputs(), FrameCache(window, sink)
    clean, level = torch.randn_like(x), torch.full((2, 6), 20.0)
    taught = model(x, t, labels, history=(clean, level))
    for i in range(6):
        made = model(x[:, :, i : i + 1], t[:, i : i + 1], labels, cache=cache)
        torch.testing.assert_close(taught[:, :, i : i + 1], made, atol=1e-5, rtol=1e-5)
        cache.writing = True
        model(clean[:, :, i : i + 1], level[:, i : i + 1], labels, cache=cache)
        cache.writing = False


@pytest.mark.parametrize("axes", [["joint"], ["spatial", "temporal"]], ids="-".join)
@torch.no_grad()
def test_a_causal_frame_attends_to_no_later_frame_and_none_before_its_window(axes):
    model, (x, t, labels) = causal(axes, 2), inputs()
    changed = x.clone()
    changed[:, :, 3] += 1
    moved = (model(x, t, labels) != model(changed, t, labels)).flatten(3).any(3).any(1)[0]
    reach = 3 + model.config.depth if axes == ["joint"] else 3 + 1  # one frame further with every temporal block
    assert moved.tolist() == [3 <= frame <= reach for frame in range(6)]


@torch.no_grad()
def test_frames_always_attend_to_the_sink_at_a_distance_of_training():
    model, (x, t, labels) = causal(["joint"], 2, sink=1, depth=1), inputs()

    def last(middle):
        """The output for frame 5 after frame 0, the frames in `middle`, and frame 4."""
        cache = FrameCache(2, 1)
        cache.writing = True
        for i in [0, *middle, 4]:
            model(x[:, :, i : i + 1], t[:, i : i + 1], labels, cache=cache)
        cache.writing = False
        return model(x[:, :, 5:], t[:, 5:], labels, cache=cache)

    long = last([1, 2, 3] * 30)
    torch.testing.assert_close(long, last([1, 2, 3]), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(last([1]), long, atol=1e-3)  # within the trained length the distance matters
    x[:, :, 0] += 1
    assert not torch.allclose(last([1, 2, 3] * 30), long, atol=1e-3)


def test_a_sink_that_was_not_trained_or_would_not_be_exact_is_refused():
    with pytest.raises(ValueError, match="sink \\+ window latent frames or more"):
        causal(["joint"], 4, sink=3)
    with pytest.raises(ValueError, match="set a window"):
        causal(["joint"], None, sink=1)
    model, (x, t, labels) = causal(["joint"], 2, sink=1), inputs(8)
    with pytest.raises(ValueError, match="frame by frame beyond the 6"):
        model(x, t, labels)
    with pytest.raises(ValueError, match="make the cache with these"):
        model(x[:, :, :1], t[:, :1], labels, cache=FrameCache(2))


@torch.no_grad()
def test_interpolated_positions_do_not_change_the_time_of_a_causal_model():
    model, (x, t, labels), cache = causal(["joint"], 3, pos_scaling="interpolate"), inputs(), FrameCache(3)
    cache.writing = True
    parts = [model(x[:, :, i : i + 1], t[:, i : i + 1], labels, cache=cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(parts, 2), model(x, t, labels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rotary_time_depends_on_distances_only():
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turned(x, position):
        return apply_rope(x, rope_freqs(np.array([[position]]), 4))

    def product(a, b):
        return (turned(query, a) * turned(key, b)).sum()

    torch.testing.assert_close(product(7, 4), product(103, 100), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(product(7, 4), product(7, 5))
    assert torch.equal(turned(query, 0), query)


@pytest.mark.parametrize("axis", AXES)
def test_packed_tokens_fold_and_unfold_without_change(axis):
    packed = PackedLayout([(2, 2, 3), (1, 2, 2), (3, 1, 2)])
    tokens = torch.arange(12 + 4 + 6).float().view(1, 1, -1, 1)
    folded = packed.fold(tokens, axis)
    assert torch.equal(packed.unfold(folded, axis), tokens)
    assert sum(packed.lengths(axis)) == 22
    assert len(packed.positions(axis)) == 22


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": True}, "needs position_encoding='rope' or"),
        ({"causal": True, "position_encoding": "rope", "axes": ["spatial"]}, "joint or temporal attention"),
        ({"window": 3}, "and needs causal=true"),
        ({"causal": True, "position_encoding": "rope", "window": 1}, "a window is 2 latent frames or more"),
        ({"pos_scaling": "interpolat"}, "Did you mean 'interpolate'"),
    ],
)
def test_invalid_causal_models_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        STDiT(depth=2, hidden_size=32, num_heads=4, **changes)


@torch.no_grad()
def test_positions_are_interpolated_into_the_trained_grid_or_extrapolated(tiny_model):
    x, t = torch.randn(1, 4, 2, 8, 8), torch.zeros(1)
    extrapolating = tiny_model(sample_size=(2, 8, 8))
    interpolating = tiny_model(sample_size=(2, 8, 8), pos_scaling="interpolate")
    assert torch.equal(extrapolating(x, t), interpolating(x, t))  # at the trained size they agree
    larger = torch.randn(1, 4, 2, 16, 8)
    assert not torch.allclose(extrapolating(larger, t), interpolating(larger, t))

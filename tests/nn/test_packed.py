import pytest
import torch

SHAPES = [(3, 4, 6), (1, 8, 4), (5, 4, 4), (3, 6, 4), (2, 2, 2)]


def clips(channels=4):
    latents = [torch.randn(channels, *shape) for shape in SHAPES]
    timesteps = [torch.rand(()) * 1000 if i % 2 else torch.rand(shape[0]) * 1000 for i, shape in enumerate(SHAPES)]
    return latents, timesteps, torch.tensor([0, 5, 2, 3, 1])


@pytest.mark.parametrize("axes", [["joint"], ["spatial", "temporal"], ["spatial", "joint"]], ids="-".join)
@pytest.mark.parametrize("entry", ["sincos", "sincos+rope_3d"])
def test_packed_equals_unpacked_in_loss_and_gradients(tiny_model, axes, entry):
    model = tiny_model(axes=axes, position_encoding=entry, qk_norm=True)
    latents, timesteps, labels = clips()
    losses, gradients = [], []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            outputs = model.packed(latents, timesteps, labels)
        else:
            outputs = [
                model(x[None], t[None], class_labels=y[None])[0]
                for x, t, y in zip(latents, timesteps, labels, strict=True)
            ]
        loss = torch.stack([output.square().mean() for output in outputs]).mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for name, expected in gradients[1].items():
        assert (gradients[0][name] - expected).norm() <= 1e-5 * expected.norm().clamp(min=1e-3), name


def test_a_clip_in_a_pack_does_not_attend_to_the_others(tiny_model):
    model = tiny_model(axes=["spatial", "temporal"])
    latents, timesteps, labels = clips()
    before = model.packed(latents, timesteps, labels)
    latents[1] = latents[1] + 1
    after = model.packed(latents, timesteps, labels)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]


def test_packing_is_refused_by_models_that_do_not_support_it(tiny_model):
    latents, timesteps, labels = clips()
    for changes in ({"causal": True, "position_encoding": "rope"}, {"pos_scaling": "interpolate"}):
        with pytest.raises(ValueError, match="packed sequences take models with"):
            tiny_model(**changes).packed(latents, timesteps, labels)

import math

import numpy as np
import pytest
import torch

from stdit.evaluation.features import distances, extract_features, load_extractor
from stdit.evaluation.frechet import JEDI, Gaussian, frechet_distance, kernel_distance
from stdit.evaluation.metrics import psnr, ssim
from stdit.evaluation.vjepa import prepare


def gaussian(features):
    return Gaussian().add(features)


def test_two_gaussians_that_commute_are_as_far_apart_as_the_formula_says():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(gaussian(x).covariance)).T  # exactly N(0, 1)
    scales, move = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])
    expected = float(move.square().sum() + (scales - 1).square().sum())
    assert frechet_distance(gaussian(x), gaussian(x * scales + move)) == pytest.approx(expected, abs=1e-9)
    assert frechet_distance(gaussian(x), gaussian(x)) == pytest.approx(0, abs=1e-9)


def test_parts_in_any_order_give_the_gaussian_of_all_even_far_from_zero():
    torch.manual_seed(0)
    x = 1e6 + torch.randn(60, 5, dtype=torch.float64)
    streamed = gaussian(x[:7]).add(x[7:20])
    merged = gaussian(x[20:33]).merge(Gaussian()).merge(gaussian(x[33:])).merge(streamed)
    for whole in (merged, Gaussian().merge(merged)):
        np.testing.assert_allclose(whole.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(whole.covariance, np.cov(x.numpy().T), atol=1e-8)
    assert merged.count == 60


def test_the_kernel_distance_is_the_mean_over_pairs_and_unbiased():
    torch.manual_seed(0)
    a, b = torch.randn(5, 4), torch.randn(6, 4)

    def k(x, y):
        return float((x @ y / 4 + 1) ** 3)

    def pairs(x, y):
        return [k(x[i], y[j]) for i in range(len(x)) for j in range(len(y)) if x is not y or i != j]

    expected = np.mean(pairs(a, a)) + np.mean(pairs(b, b)) - 2 * np.mean(pairs(a, b))
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-5)
    same = [kernel_distance(torch.randn(50, 4), torch.randn(50, 4)) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(200)


def test_the_kernel_distance_of_jedi_is_that_of_its_authors():
    # The two sets, and the value by scikit-learn's kernel, that stand in their code (videojedi/mmd_polynomial.py).
    a = torch.arange(1.0, 10).view(3, 3)
    b = torch.tensor([[7.0, 6, 5], [4, 3, 2], [1, 1, 8], [0, 2, 5]])
    assert kernel_distance(a, b, JEDI) / 100 == pytest.approx(270.7, abs=0.05)
    assert kernel_distance(a, a, JEDI) == 0


@pytest.fixture(scope="module")
def vjepa2(tmp_path_factory):
    """A function that writes a tiny V-JEPA 2 of random weights, as an encoder or with a classifier."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (stdit[transformers])")
    folder = tmp_path_factory.mktemp("vjepa2")

    def write(kind):
        config = transformers.VJEPA2Config(
            crop_size=32, frames_per_clip=4, hidden_size=24, num_attention_heads=2, num_hidden_layers=2, num_pooler_layers=1,
            pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1, mlp_ratio=2.0,
        )  # fmt: skip
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder / kind)
        return folder / kind

    return write


@pytest.mark.parametrize("kind", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
def test_features_of_vjepa2_are_those_of_transformers(vjepa2, kind):
    import transformers

    folder = vjepa2(kind)
    extractor = load_extractor(f"vjepa2={folder}")
    assert extractor.kernel == "JEDi with V-JEPA 2" and extractor.polynomial == JEDI and folder.name in extractor.name
    pixels = torch.rand(2, 3, 4, 48, 40) * 2 - 1
    found = extractor.run(pixels)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = prepare(pixels, 32, 2)
        if kind == "VJEPA2Model":
            expected = model.get_vision_features(inputs).mean(1)
        else:
            expected = model.pooler(model.vjepa2(inputs, skip_predictor=True).last_hidden_state)
    assert found.shape == (2, 24)
    torch.testing.assert_close(found, expected)
    other = distances([torch.rand(4, 3, 4, 48, 40)], [pixels], extractor)
    same = distances([pixels], [pixels], extractor)
    assert other.kernel > same.kernel == 0 and other.names == ("Fréchet distance", "JEDi with V-JEPA 2")


def test_frames_for_vjepa2_are_resized_cropped_and_normalised():
    grey = prepare(torch.zeros(1, 3, 3, 20, 30), 32, 2)
    assert grey.shape == (1, 4, 3, 32, 32)
    expected = (torch.full((3,), 0.5) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(grey[0, 0, :, 16, 16], expected)
    ramp = torch.linspace(-1, 1, 3 * 64).expand(1, 3, 2, 64, 3 * 64)
    middle = prepare(ramp, 32, 2)[0, 0, 0, 0] * 0.229 + 0.485
    # The middle 32 of 36 * 3 columns of a ramp from 0 to 1.
    torch.testing.assert_close(middle, (torch.arange(32) + 38.5) / 108, atol=4e-3, rtol=0)


def test_folders_that_are_no_whole_vjepa2_are_refused(vjepa2, tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="is no folder"):
        load_extractor("vjepa2=facebook/vjepa2-vitl-fpc64-256")
    transformers.CLIPTextConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="is a 'clip_text_model'"):
        load_extractor(f"vjepa2={tmp_path / 'clip'}")
    whole = vjepa2("VJEPA2Model")
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layernorm.weight"))
    save_file(
        {**{k: v for k, v in tensors.items() if k != name}, "more": torch.zeros(99)},
        part / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="lacks 1 weights"):
        load_extractor(f"vjepa2={part}")


def test_psnr_and_ssim_are_highest_for_equal_clips_and_fall_with_noise():
    torch.manual_seed(0)
    clip = torch.rand(2, 3, 3, 24, 24) * 2 - 1
    scores = [(psnr(clip + s * torch.randn_like(clip), clip), ssim(clip + s * torch.randn_like(clip), clip)) for s in (0.02, 0.1, 0.5)]  # fmt: skip
    assert ssim(clip, clip) == pytest.approx(1)
    assert psnr(clip + 0.2, clip) == pytest.approx(20, abs=1e-4)
    assert scores == sorted(scores, reverse=True)
    moved = ssim(clip + 0.1, clip)  # a change of brightness does not lower SSIM much
    assert moved > scores[1][1]


def test_the_tiny_vae_distinguishes_moving_clips_from_still_ones_and_from_noise():
    extractor = load_extractor("vae")
    torch.manual_seed(0)
    base = torch.nn.functional.interpolate(torch.rand(48, 3, 5, 4, 4) * 2 - 1, size=(5, 16, 16), mode="trilinear")
    other = torch.nn.functional.interpolate(torch.rand(48, 3, 5, 4, 4) * 2 - 1, size=(5, 16, 16), mode="trilinear")
    still, noise = other[:, :, :1].expand_as(other), torch.rand(48, 3, 5, 16, 16) * 2 - 1
    near, *far = (distances([x], [base], extractor) for x in (other, still, noise))
    assert near.frechet < min(other.frechet for other in far)
    assert near.kernel < min(other.kernel for other in far)
    assert near.names == ("Fréchet distance", "kernel distance") and "VAE" in near.extractor


def test_an_extractor_file_is_run_unchanged_and_only_inception_is_called_fid(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            return x.float().mean((2, 3))

    file = tmp_path / "inception.pt"
    torch.jit.script(Mean()).save(str(file))
    extractor = load_extractor(f"inception={file}")
    assert (extractor.frechet, extractor.kernel) == ("FID", "KID")
    summed, collected = extract_features([torch.ones(2, 3, 4, 8, 8)], extractor)
    assert summed.count == 8 and torch.equal(collected.concatenated(), torch.full((8, 3), 255.0, dtype=torch.float64))
    script = load_extractor(f"script={file}")
    assert script.frechet == "Fréchet distance"
    with pytest.raises(ValueError, match=r"features are \(N, D\)"):
        extract_features([torch.ones(2, 3, 4, 8, 8)], script)


@pytest.mark.parametrize(
    ("choice", "message"),
    [("fid", "write vae, or one of"), ("i3d", "write vae"), ("script=nowhere.pt", "does not exist")],
)
def test_missing_extractors_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(choice)


def test_sets_without_a_distance_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        gaussian(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="2 or more"):
        frechet_distance(gaussian(torch.ones(1, 2)), gaussian(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="2 or more"):
        kernel_distance(torch.ones(1, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="smaller than SSIM"):
        ssim(torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8))

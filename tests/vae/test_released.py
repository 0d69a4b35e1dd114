"""Bare files of weights of TAEHV and LeanVAE: recognised by their tensors, strict, and never a pickle."""

import json

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file, save_file

from stdit.model.stdit import STDiT
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import load_vae, tiny
from stdit.vae.leanvae import LeanVAE, haar, inverse_haar
from stdit.vae.taehv import TAEHV

WIDTHS = (16, 8, 8, 8)
# As the repository of TAEHV has them, by file: latent channels, patch, strides of encoder and decoder, decoder.
RELEASES = {
    "taew2_1": (16, 1, (2, 2, 1), (1, 2, 2), False),
    "taew2_2": (48, 2, (2, 2, 1), (1, 2, 2), False),
    "taehv1_5_super": (32, 2, (2, 2, 1), (1, 2, 2), True),
    "taeltx_2": (128, 4, (2, 2, 2), (2, 2, 2), False),
}
STRIDES = {"taew2_1": (4, 8, 8), "taew2_2": (4, 16, 16), "taehv1_5_super": (4, 16, 16), "taeltx_2": (8, 32, 32)}


def taehv(name="taew2_1"):
    channels, patch, *time, larger = RELEASES[name]
    return fill(TAEHV(channels, patch, 8, WIDTHS, *time, is_super=larger)).eval()


def lean(channels=4, **kwargs):
    return fill(LeanVAE(channels, (8, 16), (2, 3), 3, 1, **kwargs)).eval()


def written(vae, folder, name="weights.safetensors", **extra):
    folder.mkdir(exist_ok=True)
    save_file({**{key: value.contiguous() for key, value in vae.state_dict().items()}, **extra}, folder / name)
    return folder / name


@torch.no_grad()
@pytest.mark.parametrize("name", RELEASES)
def test_sizes_and_strides_of_taehv_are_read_from_its_tensors(tmp_path, name):
    saved = taehv(name)
    loaded = load_vae(str(written(saved, tmp_path)))
    assert loaded.stride == STRIDES[name] and loaded.channels == RELEASES[name][0]
    pixels = torch.rand(1, 3, 1 + loaded.stride[0], *loaded.stride[1:]) * 2 - 1
    assert torch.equal(loaded.encode(pixels), saved.encode(pixels))
    latents = torch.randn(1, loaded.channels, 2, 1, 1)
    assert torch.equal(loaded.decode(latents), saved.decode(latents))
    assert not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_sizes_of_leanvae_are_read_from_its_tensors_and_its_scale_from_its_channels(tmp_path):
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    for channels, scale in ((4, 0.7744), (16, 1.0)):
        saved = lean(channels)
        folder = written(saved, tmp_path / str(channels), std_layer=torch.ones(1)).parent
        (folder / "weights.safetensors").unlink()
        written(saved, folder, **{"std_layer.weight": torch.ones(2, 2)})  # only training uses it
        loaded = load_vae(str(folder))
        assert loaded.config.steps == 3 and list(loaded.config.layers) == [2, 3] and loaded.config.step_layers == 1
        torch.testing.assert_close(loaded.encode(pixels), scale * saved.encode(pixels))


@torch.no_grad()
def test_a_config_next_to_leanvaes_weights_gives_the_space_that_it_was_aligned_with(tmp_path):
    saved = lean(16, pixel_range=1.0, latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    folder = written(saved, tmp_path).parent
    settings = {"pixel_range": 1.0, "latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}
    (folder / "config.json").write_text(json.dumps(settings))
    pixels = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    loaded = load_vae(str(folder))
    assert torch.equal(loaded.encode(pixels), saved.encode(pixels)) and loaded.fingerprint() == saved.fingerprint()
    assert saved.fingerprint() != lean(16, pixel_range=1.0).fingerprint()  # of the same weights
    for wrong, said in (({"pixel_rang": 1}, "has no 'pixel_rang'"), ({"latents_std": [1.0] * 3}, "3 numbers for 16")):
        (folder / "config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match=said):
            load_vae(str(folder))


@torch.no_grad()
@pytest.mark.parametrize("make", [taehv, lean])
def test_long_clips_are_coded_in_parts_with_the_numbers_of_the_whole(monkeypatch, make):
    vae = make()
    pixels, latents = torch.rand(1, 3, 13, 16, 16) * 2 - 1, torch.randn(1, vae.channels, 4, 2, 2)
    whole = vae.encode(pixels), vae.decode(latents)
    for most in (1, 2 * 8 * 16 * 16):  # pixels: one group at a time, and two
        monkeypatch.setattr(tiny, "MOST_PIXELS", most)
        for found, expected in zip((vae.encode(pixels), vae.decode(latents)), whole, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_wavelets_are_inverted_and_order_the_bands_by_axis():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, 8)
    torch.testing.assert_close(inverse_haar(haar(x, (2, 3, 4)), (2, 3, 4)), x)
    bands = haar(x, (4, 3)).unflatten(1, (4, 3))
    torch.testing.assert_close(bands[:, 0, :, 0, 0, 0], x[:, :, 0, :2, :2].sum((2, 3)))
    torch.testing.assert_close(bands[:, 1, :, 0, 0, 0], x[:, :, 0, 0, :2].sum(2) - x[:, :, 0, 1, :2].sum(2))


def test_a_latent_of_taehv_sees_the_frames_that_it_merges_and_a_latent_of_leanvae_no_later_one():
    for vae, seen in ((taehv(), 4), (lean(), 1)):
        pixels = torch.zeros(1, 3, 9, *vae.stride[1:], requires_grad=True)
        gradient = torch.autograd.grad(vae.encode(pixels)[:, :, 0].square().sum(), pixels)[0]
        assert gradient.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist() == list(range(seen))


@pytest.mark.parametrize("make", [taehv, lean])
def test_weights_with_other_names_or_shapes_are_refused(tmp_path, make):
    vae = make()
    key = next(key for key in vae.state_dict() if key.startswith("decoder.") and key.endswith("bias"))
    for change in ("gone", "shape", "more"):
        tensors = load_file(written(vae, tmp_path))
        if change == "more":
            tensors["decoder.further"] = torch.zeros(1)
        elif change == "shape":
            tensors[key] = torch.zeros(len(tensors[key]) + 1)
        else:
            del tensors[key]
        save_file(tensors, tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match=f"1 tensors are not those of {vae.name}") as caught:
            load_vae(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_pickles_and_folders_that_leave_a_choice_are_refused_with_a_remedy(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "taehv.pth")
    for name in (tmp_path, tmp_path / "taehv.pth"):
        with pytest.raises(ValueError, match=r"is a pickle, which stdit never loads.*safetensors/.*new-vae\.md"):
            load_vae(str(name))
    written(taehv(), tmp_path, "a.safetensors")
    assert load_vae(str(tmp_path)).name == "TAEHV"
    written(taehv(), tmp_path, "b.safetensors")
    with pytest.raises(ValueError, match=r"2 files of weights \(a.safetensors, b.safetensors\); give the path of one"):
        load_vae(str(tmp_path))
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="neither TAEHV nor LeanVAE"):
        load_vae(str(tmp_path / "c.safetensors"))
    (tmp_path / "c.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_vae(str(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match="MiniMax H3"):
        load_vae(str(written(TAEHV(24, 2, 8, WIDTHS), tmp_path, "h3.safetensors")))


def test_weights_that_announce_more_than_they_hold_take_no_memory(tmp_path):
    tensors = load_file(written(lean(), tmp_path))
    tensors["encoder.video_low_proj.1.weight"] = torch.zeros(8, 0)
    save_file(tensors, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="variant that stdit does not know"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"widths": [10**6, 10**6]}))
    written(lean(), tmp_path)
    with pytest.raises(ValueError, match="asks for"):
        load_vae(str(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("make", [taehv, lean])
def test_a_pipeline_with_it_samples_and_is_saved_and_loaded(tmp_path, make):
    vae = make()
    model = fill(
        STDiT(depth=1, hidden_size=16, num_heads=2, in_channels=vae.channels, sample_size=(2, 2, 2), learn_sigma=False)
    )
    pipe = STDiTPipeline(model, vae, STDiTScheduler(), num_frames=5, height=16, width=16)
    pipe.save_pretrained(tmp_path)
    options = {"num_inference_steps": 1, "seed": 0, "progress": False}
    again = STDiTPipeline.from_pretrained(tmp_path)
    assert torch.equal(again(**options), pipe(**options))
    assert load_vae(str(tmp_path / "vae")).fingerprint() == vae.fingerprint()

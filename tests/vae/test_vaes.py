"""One interface for every VAE: the same tests on tiny random configurations of each."""

import copy

import diffusers
import pytest
import torch
from conftest import fill

from stdit.vae import TinyVAE, VAEGeometry, VideoVAE, as_video_vae, load_vae
from stdit.vae.adapters import DiffusersVAE
from stdit.vae.leanvae import LeanVAE
from stdit.vae.taehv import TAEHV

SMALL = (8, 8, 8, 8)


def autoencoder_kl():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, **blocks)


VAES = {
    "tiny": lambda: fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))),
    "kl": autoencoder_kl,
    "wan": lambda: diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
    "cogvideox": lambda: diffusers.AutoencoderKLCogVideoX(block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, latent_channels=4),
    "hunyuan": lambda: diffusers.AutoencoderKLHunyuanVideo(block_out_channels=SMALL, norm_num_groups=4, layers_per_block=1, latent_channels=4),
    "ltx": lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=SMALL, decoder_block_out_channels=SMALL, layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5
    ),
    "taehv": lambda: fill(TAEHV(channels=4, encoder_width=8, decoder_widths=SMALL)),
    "taehv_super": lambda: fill(TAEHV(4, 2, 8, SMALL, (2, 2, 2), (2, 2, 2), is_super=True)),
    "leanvae": lambda: fill(LeanVAE(widths=(8, 16), latents_mean=(0.1, 0.2, -0.3, 0.0), latents_std=(0.5,))),
}  # fmt: skip


@pytest.fixture(scope="module", params=VAES)
def vae(request):
    torch.manual_seed(0)
    return as_video_vae(VAES[request.param]()).eval()


@pytest.fixture(scope="module")
def clip(vae):
    frames = vae.pixel_frames(1) + 2 * (vae.temporal_granularity or vae.stride[0])
    return (
        torch.rand(2, 3, frames, 2 * vae.stride[1], 2 * vae.stride[2], generator=torch.Generator().manual_seed(0)) * 2
        - 1
    )


@torch.no_grad()
def test_shapes_follow_the_arithmetic_there_and_back(vae, clip):
    latents = vae.encode(clip)
    frames = vae.latent_frames(clip.shape[2])
    assert latents.shape == (2, vae.channels, frames, 2, 2)
    assert vae.latent_shape(*clip.shape[2:]) == (frames, 2, 2)
    assert vae.pixel_frames(frames) == clip.shape[2]
    assert vae.decode(latents).shape == clip.shape


@torch.no_grad()
def test_latents_are_normalised_by_the_statistics_of_the_vae(vae, clip):
    if vae.name == "TAEHV":
        pytest.skip("its latents are normalised by its weights")
    mean, std = vae.latent_mean.clone(), vae.latent_std.clone()
    latents, decoded = vae.encode(clip), vae.decode(vae.encode(clip))
    vae.latent_mean.copy_(mean + 0.5)
    vae.latent_std.copy_(std * 2)
    try:
        shape = (1, -1, 1, 1, 1)
        torch.testing.assert_close(
            vae.encode(clip), (latents * std.view(shape) - 0.5) / (2 * std.view(shape)), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(vae.decode(vae.encode(clip)), decoded, atol=1e-4, rtol=1e-3)
    finally:
        vae.latent_mean.copy_(mean)
        vae.latent_std.copy_(std)


@torch.no_grad()
def test_an_image_is_its_clips_first_latent_frame_where_the_vae_says_so(vae, clip):
    difference = (vae.encode(clip[:, :, :1]) - vae.encode(clip)[:, :, :1]).abs().max()
    assert (difference < 2e-6) == vae.image_is_first_frame


@torch.no_grad()
def test_causal_latents_ignore_later_pixels(vae, clip):
    changed = clip.clone()
    changed[:, :, -1] = -changed[:, :, -1]
    differs = (vae.encode(clip) - vae.encode(changed)).abs().amax(dim=(0, 1, 3, 4)) > 2e-6
    assert differs[-1]
    if vae.causal:
        assert not differs[:-1].any()


@torch.no_grad()
def test_a_stream_decodes_to_the_same_clip(vae, clip):
    latents = vae.encode(clip)
    parts = list(vae.decode_stream(latents))
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(latents), atol=1e-5, rtol=1e-5)


def test_frame_counts_that_would_be_cropped_are_refused_with_the_nearest(vae):
    step = vae.temporal_granularity or vae.stride[0]
    if step > 1:
        with pytest.raises(ValueError, match=f"1 \\+ a multiple of {step}. Use {1 + step} or {1 + 2 * step}"):
            vae.encode(torch.zeros(1, 3, 2 + step, 2 * vae.stride[1], 2 * vae.stride[2]))
    with pytest.raises(ValueError, match="num_frames=0"):
        vae.latent_frames(0)


def test_sizes_that_would_be_cropped_are_refused_with_the_nearest(vae):
    stride = vae.stride[1]
    with pytest.raises(ValueError, match=f"height={stride + 2} .* Use {stride} or {2 * stride}"):
        vae.encode(torch.zeros(1, 3, 1, stride + 2, stride))
    with pytest.raises(ValueError, match=f"width=0 .* Use {stride}"):
        vae.latent_size(stride, 0)


def test_a_vae_without_encoder_and_decoder_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        VideoVAE()

    class Half(VideoVAE):
        def _encode(self, pixels):
            return pixels

    with pytest.raises(TypeError, match="_decode"):
        Half()


def test_device_and_dtype_are_those_of_the_weights(vae):
    assert set(VideoVAE.__subclasses__()) >= {TinyVAE, DiffusersVAE}
    assert vae.device == torch.device("cpu")
    assert vae.dtype == torch.float32
    moved = copy.deepcopy(vae).to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    assert moved.to("meta").device == torch.device("meta")


def test_the_geometry_alone_has_the_arithmetic_of_its_vae(vae):
    geometry = VAEGeometry(vae.name, vae.stride, vae.channels, vae.temporal_granularity)
    frames = 1 + 2 * (vae.temporal_granularity or vae.stride[0])
    height, width = 4 * vae.stride[1], 6 * vae.stride[2]
    assert geometry.latent_shape(frames, height, width, (1, 2, 2)) == vae.latent_shape(frames, height, width, (1, 2, 2))
    assert geometry.pixel_frames(geometry.latent_frames(frames)) == frames
    with pytest.raises(ValueError, match=f"VAE {vae.name!r}"):
        geometry.latent_size(height + 1, width)


def test_the_frames_of_all_latents_are_the_clip(vae, clip):
    parts = [vae.frames_of_latent(clip, t) for t in range(vae.latent_frames(clip.shape[2]))]
    assert [part.shape[2] for part in parts] == [1] + [vae.stride[0]] * (len(parts) - 1)
    assert torch.equal(torch.cat(parts, dim=2), clip)


def test_tensors_of_another_layout_are_refused(vae):
    with pytest.raises(ValueError, match="give an image as one frame"):
        vae.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="latents encoded by this VAE"):
        vae.decode(torch.zeros(1, vae.channels + 1, 1, 2, 2))


def test_a_fingerprint_changes_with_the_weights_that_make_latents(vae):
    before, whole = vae.fingerprint(), vae._hash(lambda key: True)
    assert before == vae.fingerprint() and vae.has_fingerprint(before) and vae.has_fingerprint(whole)
    parts = ({"decoder", "post_quant_conv"}.isdisjoint(name.split(".")) for name, _ in vae.named_parameters())
    by_part = {not makes: p for makes, p in zip(parts, vae.parameters(), strict=True) if p.numel() > 1}
    for decodes, weight in by_part.items():
        with torch.no_grad():
            kept = weight.clone()
            weight.view(-1)[0] += 1
            assert (vae.fingerprint() == before) == decodes and not vae.has_fingerprint(whole)
            weight.copy_(kept)


def test_caches_and_runs_of_the_earlier_decoder_are_those_of_the_vae_that_ships():
    assert load_vae("tiny").has_fingerprint("a980c6890d92b274")


def test_patches_that_do_not_divide_latents_are_refused_in_pixels(vae):
    stride = vae.stride[1]
    with pytest.raises(ValueError, match=f"height={3 * stride} gives 3 latents, .* Use {2 * stride} or {4 * stride}"):
        vae.latent_shape(1, 3 * stride, 2 * stride, (1, 2, 2))


def test_diffusers_folders_load_behind_the_interface(tmp_path):
    torch.manual_seed(0)
    saved = as_video_vae(VAES["wan"]())
    saved.vae.save_pretrained(tmp_path / "wan")
    loaded = load_vae(str(tmp_path / "wan"))
    assert loaded.name == "AutoencoderKLWan"
    assert loaded.fingerprint() == saved.fingerprint()
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints/none", "vae.name 'checkpoints/none' is not a folder"),
        ("tinny", "is not a folder"),
        ("nobody/nothing", "vae.name=tiny works without any download"),
    ],
)
def test_a_vae_that_is_not_found_is_refused_in_one_line(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(name)
    assert "\n" not in str(caught.value)

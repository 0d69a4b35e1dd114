"""Every trunk and conditioning from a config: it trains, resumes and samples."""

from pathlib import Path

import pytest

from stdit.data.video_io import VideoReader
from stdit.recipes import evaluate, sample, train
from stdit.sampling.pipeline import STDiTPipeline

TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 24, workers: 0}
model: {size: S/2, depth: 3, hidden_size: 32, num_heads: 2}
train: {steps: 2, decay_steps: 4, batch_size: 4, ema_decay: 0.9, checkpoint_every: 1, preview_every: 100, samples: 2,
        sample_steps: 2, precision: fp32}
"""
WORDS = ["text.encoder=words", "model.num_classes=0"]
FAMILY = {
    "adaln_single": ["model.conditioning=adaln_single"],
    "captions": [*WORDS, "model.conditioning=adaln_single"],
    "captions and labels": ["text.encoder=words", "model.conditioning=cross_attention"],
    "u-vit": ["model.conditioning=in_context", "model.trunk=long_skip", "model.learned_pos_embed=true", "model.timestep_mlp=false",
              "model.activation=gelu", "model.output_conv=true"],
    "mdt": ["model.trunk=masked", "model.num_decoder_blocks=1", "model.learned_pos_embed=true", "model.relative_position_bias=true",
            "objective.mask_ratio=0.3"],
    "diffit": ["model.conditioning=time_attention", "model.relative_position_bias=true", "model.trunk=u_shape"],
    "flux": [*WORDS, "model.trunk=dual_stream", "model.num_single_blocks=1"],
    "u-net": ["model.network=unet", "model.unet_channels=[8,16]", "objective.name=ddpm", "objective.betas=scaled_linear",
              "objective.learn_sigma=false"],
    "u-net of images": ["model.network=unet", "model.unet_channels=[8,16]", "data.num_frames=1"],
    "teacher_forcing": ["model.causal=true", "model.position_encoding=rope", "model.window=2", "objective.mask_strategy=teacher_forcing",
                "objective.cond_noise_max=0.3"],
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_a_config_trains_resumes_and_samples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml", *FAMILY[name]]) == 0
    assert train.run(["t.yaml", *FAMILY[name], "train.steps=3"]) == 0  # goes on
    frames = STDiTPipeline.from_pretrained("models/t").config.num_frames
    said = ["--caption", "a red circle moves left"] if "text.encoder=words" in FAMILY[name] else []
    output = "clip.png" if frames == 1 else "clip.mp4"
    many = ["--num-videos", "1"] if "model.num_classes=0" in FAMILY[name] else ["--class-label", "circle left"]
    assert sample.main(["--steps", "2", "--output", output, *said, *many]) == 0
    assert Path(output).is_file()
    if frames > 1:
        with VideoReader(output) as reader:
            assert (len(reader), reader.size) == (5, (32, 32))


def test_captions_need_data_with_captions_and_a_model_with_captions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml"]) == 0
    with pytest.raises(ValueError, match="trained without captions"):
        sample.main(["--steps", "1", "--caption", "a red circle"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(pictures / "a.png")
    code = train.run(["t.yaml", "text.encoder=words", "data.source=images", f"data.root={pictures}", "data.num_frames=1", "name=u"])  # fmt: skip
    assert code == 1 and "has a caption" in capsys.readouterr().err


def test_clips_are_compared_with_clips_and_captions_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml", *FAMILY["captions"]]) == 0
    assert evaluate.main(["--captions", "red circle", "--clips", "2", "--steps", "1"]) == 0
    assert "pairs left out" in capsys.readouterr().out
    from stdit.recipes import make_shapes

    for seed in ("0", "1"):
        make_shapes.main(["--output", f"s{seed}", "--num-clips", "4", "--frames", "5", "--size", "32", "--seed", seed])
    same = ["--input", "s0", "--reference", "s0", "--frames", "5", "--size", "32"]
    assert evaluate.main([*same, "--paired"]) == 0
    said = capsys.readouterr().out
    assert "SSIM: 1.0000" in said and "Fréchet distance: 0.0000" in said.replace("-0.0000", "0.0000")
    assert evaluate.main(["--input", "s0", "--reference", "s1", "--frames", "5", "--size", "32"]) == 0
    assert evaluate.main(["--reference", "s1", "--clips", "4", "--steps", "1", "--frames", "5", "--size", "32"]) == 0
    with pytest.raises(ValueError, match="give both"):
        evaluate.main(["--paired"])
    with pytest.raises(ValueError, match="not a colour and a shape"):
        evaluate.main(["--captions", "red cat"])


def test_make_shapes_leaves_out_the_given_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from stdit.data.manifest import read_manifest
    from stdit.recipes import make_shapes

    gone = ["red circle", "blue circle", "pink square"]
    make_shapes.main(["--output", "s", "--num-clips", "72", "--frames", "2", "--size", "32", "--without", *gone])
    captions = [row.caption for row in read_manifest(Path("s/manifest.jsonl")).rows]
    assert not any(pair in caption for pair in gone for caption in captions)
    assert any("red" in caption for caption in captions) and any("circle" in caption for caption in captions)
    with pytest.raises(ValueError, match="not a colour and a shape"):
        make_shapes.main(["--output", "t", "--without", "red cat"])

"""The convert command, and files that are not the expected weights."""

import argparse
import json
import os
import pickle  # to make a poisoned file; nothing here loads one
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from stdit.model.stdit import STDiT
from stdit.recipes import cli, sample
from stdit.recipes import convert as recipe
from stdit.sampling.pipeline import STDiTPipeline

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture
def dit():
    """A state dict of DiT in the original layout."""
    tensors = load_file(REFERENCE / "dit.safetensors")
    return {k.removeprefix("weights."): v.clone() for k, v in tensors.items() if k.startswith("weights.")}


def convert(source, output, *more):
    return recipe.main([str(source), "--output", str(output), *more])


DIT = ("--from", "dit", "--set", "num_heads=4")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s, "args": argparse.Namespace(a=1), "opt": {}},
    ],
)
def test_a_bare_state_dict_and_a_training_checkpoint_load_alike(dit, wrap, tmp_path, capsys):
    torch.save(wrap(dit), tmp_path / "dit.pt")
    assert convert(tmp_path / "dit.pt", tmp_path / "out", *DIT) == 0
    model = STDiT.from_pretrained(tmp_path / "out")
    assert torch.equal(model.blocks[1].mlp.fc1.weight, dit["blocks.1.mlp.fc1.weight"])
    assert "depth 2, width 32, 4 heads, patch [1, 2, 2], 4 channels, 5 classes" in capsys.readouterr().out


def test_weights_model_reads_the_raw_weights_of_a_training_checkpoint(dit, tmp_path):
    torch.save({"model": {k: v + (k.endswith("bias")) for k, v in dit.items()}, "ema": dit}, tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", tmp_path / "out", *DIT, "--weights", "model")
    model = STDiT.from_pretrained(tmp_path / "out")
    assert torch.equal(model.blocks[1].mlp.fc1.bias, dit["blocks.1.mlp.fc1.bias"] + 1)


def test_exported_weights_load_in_the_original(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT)
    convert(tmp_path / "out", tmp_path / "back.pt", "--to", "dit")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[k], dit[k]) for k in dit if k != "pos_embed")


def test_our_own_weights_need_no_conversion(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT)
    with pytest.raises(ValueError, match="are stdit's own weights already"):
        convert(tmp_path / "out", tmp_path / "again", *DIT)


def test_a_model_that_a_format_cannot_express_is_not_written(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT)
    with pytest.raises(ValueError, match=r"cannot be written as 'diffusers'.*frequency_shift=0.0 \(not 1.0\)"):
        convert(tmp_path / "out", tmp_path / "back", "--to", "diffusers")
    assert not (tmp_path / "back").exists()


def dit_pipeline(folder: Path) -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    first = transformer.transformer_blocks[0].norm1.emb.state_dict()
    transformer.transformer_blocks[1].norm1.emb.load_state_dict(first)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4)  # fmt: skip
    pipe = DiTPipeline(transformer, vae, DDIMScheduler(beta_schedule="linear", clip_sample=False))
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())  # the released folders carry their names here
    names = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "shark"}
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    return pipe


def test_a_whole_diffusers_pipeline_becomes_a_pipeline_that_samples_by_class_name(tmp_path):
    pipe = dit_pipeline(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "--from", "diffusers")
    ours = STDiTPipeline.from_pretrained(tmp_path / "ours")
    assert ours.labels(["Tinca tinca", "shark", 1]).tolist() == [0, 2, 1]
    assert (ours.config.height, ours.config.num_frames, ours.config.objective) == (16, 1, "ddpm")
    x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([100]), torch.tensor([2])
    with torch.no_grad():
        theirs = pipe.transformer(x, t, y).sample
        assert (ours.transformer(x[:, :, None], t.float(), y)[:, :, 0] - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert torch.equal(
        STDiT.from_pretrained(tmp_path / "ours").x_embedder.proj.bias, ours.transformer.x_embedder.proj.bias
    )
    done = sample.main(
        [
            "--model",
            str(tmp_path / "ours"),
            "--class-label",
            "goldfish",
            "--steps",
            "2",
            "--output",
            str(tmp_path / "a.png"),
        ]
    )
    assert done == 0
    assert (tmp_path / "a.png").stat().st_size > 0


def test_with_a_vae_the_output_is_a_pipeline(dit, tmp_path):
    dit_pipeline(tmp_path / "theirs")
    save_file(dit, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT, "--vae", str(tmp_path / "theirs" / "vae"))
    pipe = STDiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe([1], num_inference_steps="ddim25", progress=False).shape == (1, 3, 1, 16, 16)


class Poison:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def poisoned(folder, dit):
    torch.save({"model": Poison(folder / "ran")}, folder / "bad.pt")


def bare_pickle(folder, dit):
    (folder / "bad.pt").write_bytes(pickle.dumps(Poison(folder / "ran")))


def truncated(folder, dit):
    torch.save(dit, folder / "whole.pt")
    (folder / "bad.pt").write_bytes((folder / "whole.pt").read_bytes()[:20_000])


def lora(folder, dit):
    torch.save({"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 2)}, folder / "bad.pt")


def not_finite(folder, dit):
    dit["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    torch.save(dit, folder / "bad.pt")


def missing(folder, dit):
    del dit["blocks.1.attn.proj.bias"]
    dit["blocks.1.extra"] = torch.ones(1)
    dit["final_layer.adaLN_modulation.1.bias"] = torch.ones(3)
    torch.save(dit, folder / "bad.pt")


def latte(folder, dit):
    tensors = load_file(REFERENCE / "latte.safetensors")
    torch.save(
        {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}, folder / "bad.pt"
    )


def learned_table(folder, dit):
    torch.save({**dit, "pos_embed": torch.randn_like(dit["pos_embed"])}, folder / "bad.pt")


def numbers(folder, dit):
    torch.save([1, 2], folder / "bad.pt")


def headless(folder, dit):
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(2, 2)}, folder / "bad.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (poisoned, "holds (posix|os|nt).system, which is not a tensor and could run code"),
        (bare_pickle, "holds (posix|os|nt).system|not a complete file"),
        (truncated, "is not a complete file of torch weights"),
        (lora, "is a LoRA, not a model"),
        (not_finite, "1 of 32 tensors have NaN or infinite numbers, the first 'blocks.0.attn.qkv.weight'"),
        (missing, r"nothing was loaded. missing: blocks.1.attn.proj.bias; unexpected: blocks.1.extra; of another shape: final_layer.adaLN_modulation.1.bias \(3,\) \(expected \(64,\)\)"),
        (latte, "are not 'dit' weights: they look like 'latte'. Use --from latte"),
        (learned_table, "'pos_embed' is not the sin-cos table"),
        (numbers, "holds list, not a state dict"),
        (headless, "are not 'dit' weights"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_in_one_line_and_nothing_runs_or_is_written(make, message, dit, tmp_path):
    make(tmp_path, dit)
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "bad.pt", tmp_path / "out", *DIT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_error_for_unknown_heads_names_the_setting(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="32 wide.*give it with --set num_heads=N"):
        convert(tmp_path / "dit.safetensors", tmp_path / "out", "--from", "dit")
    with pytest.raises(ValueError, match="Unknown setting of a model 'num_head'. Did you mean 'num_heads'"):
        convert(tmp_path / "dit.safetensors", tmp_path / "out", "--from", "dit", "--set", "num_head=4")
    with pytest.raises(ValueError, match="--set '4' must be key=value"):
        convert(tmp_path / "dit.safetensors", tmp_path / "out", "--from", "dit", "--set", "4")


def test_a_folder_with_two_models_or_none_is_refused(dit, tmp_path):
    with pytest.raises(ValueError, match="has no safetensors"):
        convert(tmp_path, tmp_path / "out", *DIT)
    for name in "ab":
        save_file(dit, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"holds more than one model \(a.safetensors, b.safetensors\); name one"):
        convert(tmp_path, tmp_path / "out", *DIT)


def test_nothing_is_overwritten(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; choose another --output"):
        convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_diffusers_dit_whose_blocks_have_different_embedders_is_refused(tmp_path):
    dit_pipeline(tmp_path / "theirs")
    path = tmp_path / "theirs" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match="differs from block 0's"):
        convert(tmp_path / "theirs" / "transformer", tmp_path / "out", "--from", "diffusers")


def test_the_command_line_prints_one_line_and_fails(tmp_path, capsys):
    arguments = ["convert", str(tmp_path / "none.pt"), "--from", "dit", "--output", str(tmp_path / "o")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert error.endswith("give a file of weights, or a folder that diffusers wrote.") and error.count("\n") == 0


WRONG = [
    (file, form)
    for file in ("dit", "latte")
    for form in ("dit", "sit", "latte", "diffusers")
    if form != file and (file, form) != ("dit", "sit")
]


@pytest.mark.parametrize(("file", "form"), WRONG)
def test_every_wrong_format_that_tensors_reveal_is_refused(file, form, tmp_path):
    tensors = load_file(REFERENCE / f"{file}.safetensors")
    save_file(
        {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")},
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ValueError, match=f"are not '{form}' weights: they look like '{file}'. Use --from {file}"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", "--from", form, "--set", "num_heads=4")


@pytest.mark.parametrize(
    "setting",
    ["sample_size=64", "sample_size=[1,64]", "num_heads=0", "num_heads=-4", "num_heads=four", "num_heads=4.0", "patch_size=2", "axes=5",
     "class_names=3", "depth=x", "learn_sigma=maybe", "timestep_scale=x", "norm2_eps=x", "in_channels=true"],
)  # fmt: skip
def test_a_setting_of_the_wrong_type_is_refused_before_anything_is_written(setting, dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match=f"--set {setting.split('=')[0]}=.* has the wrong type or range"):
        convert(tmp_path / "dit.safetensors", tmp_path / "new" / "out", *DIT, "--set", setting)
    assert not (tmp_path / "new").exists()


def test_repeated_settings_add_up(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    convert(
        tmp_path / "dit.safetensors",
        tmp_path / "out",
        "--from",
        "dit",
        "--set",
        "sample_size=[1,16,16]",
        "--set",
        "num_heads=4",
    )
    assert list(STDiT.from_pretrained(tmp_path / "out").config.sample_size) == [1, 16, 16]


def test_the_config_next_to_a_single_file_is_read(tmp_path):
    dit_pipeline(tmp_path / "theirs")
    folder = tmp_path / "theirs" / "transformer"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_eps": 1e-2}))
    convert(folder / "diffusion_pytorch_model.safetensors", tmp_path / "out", "--from", "diffusers")
    assert STDiT.from_pretrained(tmp_path / "out").config.norm2_eps == 1e-2


def test_missing_raw_weights_are_not_replaced_by_the_ema_weights(dit, tmp_path):
    torch.save({"ema": dit}, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="holds ema but no 'model'; use --weights ema"):
        convert(tmp_path / "dit.pt", tmp_path / "out", *DIT, "--weights", "model")


def test_an_index_that_lists_missing_files_is_refused(dit, tmp_path):
    save_file(dit, tmp_path / "a.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="more than one model"):
        convert(tmp_path, tmp_path / "out", *DIT)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="which the folder does not hold"):
        convert(tmp_path, tmp_path / "out", *DIT)


def test_an_export_needs_a_file_name_and_finite_weights(dit, tmp_path):
    save_file(dit, tmp_path / "dit.safetensors")
    convert(tmp_path / "dit.safetensors", tmp_path / "out", *DIT)
    with pytest.raises(ValueError, match="is not a file name for 'dit' weights; end it in .pt"):
        convert(tmp_path / "out", tmp_path / "back", "--to", "dit")
    model = STDiT.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.final_layer.linear.bias[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        convert(tmp_path / "nan", tmp_path / "back.pt", "--to", "dit")
    assert not (tmp_path / "back.pt").exists()

"""A pipeline's folder, its card, its parts in another pipeline, and less memory, as diffusers' pipelines have them."""

import os
import re
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import fill
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from stdit.data import VideoReader
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import HashedWordEncoder
from stdit.vae import TinyVAE

FAST = {"num_inference_steps": 2, "progress": False, "precision": "fp32"}


@pytest.fixture
def make(tiny_model):
    def build(objective="flow", vae=None, **model) -> STDiTPipeline:
        names = {"num_classes": 3, "class_names": ["a cat", "b|<b>", "c"]}
        arguments = {"in_channels": 16, "learn_sigma": False, **names, **model}
        vae = vae or fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        scheduler = STDiTScheduler(objective, learn_sigma=False)
        fingerprint = vae.fingerprint() if isinstance(vae, TinyVAE) else None
        return STDiTPipeline(tiny_model(**arguments), vae, scheduler, 5, 32, 32, 8.0, objective, fingerprint)

    return build


@pytest.fixture
def pipe(make):
    return make()


# diffusers without stdit's class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_loads_a_folder_by_the_file_in_it(pipe, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which diffusers adds its cache
    folder = str(tmp_path / "model")
    pipe.save_pretrained(folder)
    found = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True, dtype=dtype)
    ours = STDiTPipeline.from_pretrained(folder, dtype=dtype)
    assert type(found) is STDiTPipeline and found.vae.dtype == ours.vae.dtype == dtype
    assert torch.equal(found("c", **FAST), ours("c", **FAST))


def test_loading_by_stdit_never_runs_a_file_of_the_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("raise RuntimeError('this was run')\n")
    assert len(STDiTPipeline.from_pretrained(tmp_path)("c", **FAST)) == 1


# The hub


def test_revision_subfolder_and_cache_of_a_hub_id_are_those_that_are_given(pipe, tmp_path):
    cache = tmp_path / "cache"
    for revision, folder, frames in (("main", ".", 5), ("v2", ".", 9), ("main", "part", 13)):
        commit = f"{'0123'[len(revision) % 4]}" * 40
        snapshot = cache / "models--owner--name" / "snapshots" / commit
        STDiTPipeline.from_pipe(pipe, num_frames=frames).save_pretrained(snapshot / folder)
        (cache / "models--owner--name" / "refs").mkdir(exist_ok=True)
        (cache / "models--owner--name" / "refs" / revision).write_text(commit)

    def frames_of(name="owner/name", **given):
        found = STDiTPipeline.from_pretrained(name, cache_dir=cache, local_files_only=True, **given)
        return found.config.num_frames

    assert frames_of() == 5
    assert frames_of(revision="v2") == frames_of("owner/name@v2") == 9
    assert frames_of(subfolder="part") == frames_of("owner/name/part") == 13
    assert STDiTPipeline.from_pretrained(snapshot, subfolder="part").config.num_frames == 13
    with pytest.raises(
        ValueError, match="'owner/name' cannot be loaded: not in the cache, and local_files_only is set"
    ):
        frames_of(revision="v3")


def test_token_and_variant_are_given_to_the_hub(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path, variant="fp16")
    asked = []

    def download(name, **given):
        asked.append(given)
        return str(tmp_path)

    monkeypatch.setattr("stdit.sampling.folder_methods.check_reachable", lambda *given: None)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    given = {"token": "t", "force_download": True, "variant": "fp16"}
    assert STDiTPipeline.from_pretrained("owner/name", **given).config.num_frames == 5
    assert asked == [{**given, "use_safetensors": True}]


# Memory


def test_tiles_of_the_pipeline_are_those_of_every_call(pipe):
    given = {"height": 64, "width": 64, **FAST}
    tiled, whole = pipe("c", tile=4, **given), pipe("c", **given)
    latents = pipe("c", output_type="latent", **given).frames
    pipe.enable_vae_tiling(4)
    assert torch.equal(pipe("c", **given), tiled) and not torch.equal(tiled, whole)
    assert torch.equal(pipe.decode(latents), tiled)
    pipe.disable_vae_tiling()
    assert torch.equal(pipe("c", **given), whole)
    with pytest.raises(ValueError, match="tile must be >= 3"):
        pipe.enable_vae_tiling(1)


def test_a_progress_bar_is_set_as_in_diffusers(pipe, capfd):
    pipe.set_progress_bar_config(leave=True)  # elsewhere than on a terminal, a bar that is left is a line
    pipe("c", num_inference_steps=2)
    assert "2/2 [" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("c", num_inference_steps=2)
    assert capfd.readouterr().err == ""


# Parts in another pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_made_from_another_shares_its_parts(make, dtype):
    pipe = make("ddpm")
    for part in (pipe.transformer, pipe.vae):
        part.to(dtype)
    pipe.scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipe.enable_vae_tiling(16)
    again = STDiTPipeline.from_pipe(pipe)
    assert again.transformer is pipe.transformer and again.vae is pipe.vae and again.transformer.dtype == dtype
    assert dict(again.config) == dict(pipe.config)
    assert torch.equal(again("c", **FAST), pipe("c", **FAST))
    assert torch.equal(again("c", solver="ddim", **FAST), pipe("c", solver="ddim", **FAST))
    longer = STDiTPipeline.from_pipe(pipe, num_frames=9)
    assert longer.config.num_frames == 9 and pipe.config.num_frames == 5
    with pytest.raises(TypeError, match="'unet' is no part of STDiTPipeline; it has guide, scheduler"):
        STDiTPipeline.from_pipe(pipe, unet=None)
    for other in (3, None, DiffusionPipeline()):
        with pytest.raises(ValueError, match=f"from_pipe is given a {type(other).__name__}, which has not the parts"):
            STDiTPipeline.from_pipe(other)


def test_a_part_that_is_given_in_place_of_another_is_the_one_that_samples(make):
    pipe = make(num_classes=0, class_names=None, caption_channels=HashedWordEncoder().channels)
    pipe.register_to_config(text_encoder="words")
    pipe._encoder = HashedWordEncoder()
    assert STDiTPipeline.from_pipe(pipe).encoder is pipe._encoder
    assert STDiTPipeline.from_pipe(pipe, text_encoder="words").encoder is not pipe._encoder
    pipe = make("ddpm")
    scheduler = STDiTScheduler("ddpm", learn_sigma=False, betas="scaled_linear")
    made = STDiTPipeline.from_pipe(pipe, scheduler=scheduler)
    assert made.engine.objective is scheduler.objective is not pipe.engine.objective
    theirs = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    made = STDiTPipeline.from_pipe(pipe, scheduler=theirs)
    assert made.scheduler is theirs and made.engine.objective is pipe.engine.objective
    with pytest.raises(ValueError, match="has other betas"):
        STDiTPipeline.from_pipe(pipe, scheduler=DDIMScheduler(beta_schedule="scaled_linear"))


def test_a_pipeline_is_made_from_one_with_an_autoencoder_of_diffusers(make):
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=16)
    pipe = make(vae=vae)
    again = STDiTPipeline.from_pipe(pipe)
    assert again.vae is pipe.vae
    assert torch.equal(again("c", **FAST), pipe("c", **FAST))


# The card


def record(folder, **data):
    """The record of a run."""
    (folder / "samples").mkdir(parents=True)
    settings = {
        "data": {"root": "/home/someone/clips", **data},
        "train": {"steps": 40, "lr": 0.004},
        "objective": {"name": "flow"},
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")
    (folder / "summary.json").write_text('{"samples_in_data": 84, "device": "cpu", "training_seconds": 32.3}')
    (folder / "samples" / "captions.txt").write_text("a red ball\na blue ball\n")


def test_pushing_to_a_folder_writes_a_card_with_samples_training_and_licence(pipe, tmp_path):
    record(tmp_path / "output" / "mine")
    pipe.save_pretrained(tmp_path / "models" / "mine")
    pipe = STDiTPipeline.from_pretrained(tmp_path / "models" / "mine")
    target = tmp_path / "pushed"
    assert pipe.push_to_hub(str(target), license="apache-2.0", samples=3) == str(target) or target.is_dir()
    card = huggingface_hub.ModelCard.load(target / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "stdit"
    assert "generates clips from a class" in card.text and "5 frames of 32 x 32" in card.text
    assert (
        "| data | clips |" in card.text and "| steps | 40 |" in card.text and "| clips in the data | 84 |" in card.text
    )
    assert "/home/someone" not in card.text and "b\\|&lt;b>" in card.text
    assert "## Licence\n\napache-2.0." in card.text
    assert [one["text"] for one in card.data.widget] == ["a cat", "b|<b>", "c"]
    expected = pipe(["a cat", "b|<b>", "c"], progress=False)
    for i in range(3):
        assert (target / "samples" / f"{i:03d}.gif").is_file()
        with VideoReader(target / "samples" / f"{i:03d}.mp4") as reader:
            shown = torch.from_numpy(reader.get_frames(range(5))).movedim(-1, 0) / 127.5 - 1
        distances = (shown - expected).abs().flatten(1).mean(1)
        assert distances.argmin() == i
    assert torch.equal(STDiTPipeline.from_pretrained(target)("c", **FAST), pipe("c", **FAST))
    with pytest.raises(ValueError, match="is not empty; nothing is overwritten"):
        pipe.push_to_hub(str(target))


def test_the_code_of_a_card_is_python_that_loads_the_folder(pipe, tmp_path, monkeypatch):
    pipe.push_to_hub(str(tmp_path / "m"), samples=1)
    text = (tmp_path / "m" / "README.md").read_text()
    assert "No record of the training is at hand." in text and "None is stated: ask the author" in text
    code = text.split("```python\n")[1].split("```")[0]
    written = []
    monkeypatch.setattr(
        "diffusers.utils.export_to_video", lambda frames, path, fps: written.append((len(frames), path, fps))
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert written == [(5, "clip.mp4", 8)]


def test_the_card_of_a_model_with_texts_shows_prompts(make, tmp_path):
    pipe = make(num_classes=0, class_names=None, caption_channels=64)
    pipe.register_to_config(text_encoder="words")
    pipe._encoder = HashedWordEncoder()
    record(tmp_path / "run")
    pipe.push_to_hub(str(tmp_path / "m"), samples=2, run=tmp_path / "run")
    card = huggingface_hub.ModelCard.load(tmp_path / "m" / "README.md")
    assert card.data.pipeline_tag == "text-to-video"
    assert [one["text"] for one in card.data.widget] == ["a red ball", "a blue ball"]
    assert "prompt='a red ball'" in card.text
    pipe.push_to_hub(str(tmp_path / "other"), samples=["a green ball"])
    assert "prompt='a green ball'" in (tmp_path / "other" / "README.md").read_text()
    with pytest.raises(ValueError, match="holds no record of a run .no config.yaml."):
        pipe.push_to_hub(str(tmp_path / "third"), run=tmp_path)


def test_the_card_of_an_image_model_shows_pictures(make, tmp_path):
    STDiTPipeline.from_pipe(make(), num_frames=1).push_to_hub(str(tmp_path / "m"), samples=1)
    assert [path.name for path in (tmp_path / "m" / "samples").iterdir()] == ["000.png"]
    card = huggingface_hub.ModelCard.load(tmp_path / "m" / "README.md")
    assert "![0](samples/000.png)" in card.text and card.data.widget[0]["output"]["url"] == "samples/000.png"


def test_a_push_uploads_the_folder_with_its_card_and_keeps_one_that_is_there(pipe, monkeypatch):
    calls, listed = [], []

    def upload(self, folder, repo_id, **given):
        calls.append((repo_id, given))
        listed.append(sorted(os.listdir(folder)))
        return f"https://hub/{repo_id}"

    def create(repo_id, **given):
        calls.append((repo_id, given))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    monkeypatch.setattr("stdit.sampling.folder_methods.check_connection", lambda: None)
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(STDiTPipeline, "_upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *given, **more: False)
    assert (
        pipe.push_to_hub("me/mine", private=True, token="t", commit_message="first", samples=1) == "https://hub/me/mine"
    )
    assert calls == [
        ("me/mine", {"private": True, "token": "t", "exist_ok": True}),
        ("me/mine", {"token": "t", "commit_message": "first", "create_pr": False}),
    ]
    assert {"README.md", "model_index.json", "pipeline.py", "samples", "transformer", "vae"} <= set(listed[0])
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *given, **more: True)
    pipe.push_to_hub("me/mine", samples=0)
    assert not {"README.md", "samples"} & set(listed[1])


def test_a_push_without_a_connection_is_one_line_and_samples_nothing(pipe, monkeypatch):
    def refused(*given, **more):
        raise ConnectionRefusedError(111, "Connection refused")

    class Broken(HfHubHTTPError.__bases__[0]):
        """What the hub's client raises where a connection breaks."""

    def broken(*given, **more):
        raise Broken("connection\nlost")

    saved = []
    monkeypatch.setattr(STDiTPipeline, "save_pretrained", lambda *given, **more: saved.append(given))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.create_connection", refused)
    with pytest.raises(ValueError, match="'nobody/thing' cannot be pushed: .*Connection refused"):
        pipe.push_to_hub("nobody/thing")
    assert not saved
    monkeypatch.setattr("stdit.sampling.folder_methods.check_connection", lambda: None)
    monkeypatch.setattr(huggingface_hub, "create_repo", broken)
    with pytest.raises(ValueError, match="'nobody/thing' cannot be pushed: connection lost") as error:
        pipe.push_to_hub("nobody/thing", samples=0)
    assert "\n" not in str(error.value) and len(saved) == 1


def test_a_push_that_cannot_be_leaves_nothing_behind(pipe, tmp_path):
    target = tmp_path / "m"
    for given, message in [
        ({"samples": ["nope"]}, "class label 'nope' is unknown"), ({"samples": "nope"}, "class label 'nope' is unknown"),
        ({"samples": -1}, "samples must be >= 0, got -1; give a number, or a list"),
        ({"samples": True}, "samples must be a whole number, got True"), ({"samples": 1.5}, "samples must be a whole number"),
        ({"samples": [1.5]}, "class label 1.5 is neither"), ({"run": tmp_path}, "holds no record of a run"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipe.push_to_hub(str(target), **given)
        assert not target.exists()
    pipe.push_to_hub(str(target), samples="a cat")
    assert sorted(path.name for path in (target / "samples").iterdir()) == ["000.gif", "000.mp4"]


def test_saving_with_push_to_hub_pushes_with_a_card(pipe, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(STDiTPipeline, "push_to_hub", lambda self, repo_id, **given: pushed.append((repo_id, given)))
    pipe.save_pretrained(tmp_path / "mine", push_to_hub=True, license="mit")
    assert pushed == [("mine", {"license": "mit"})] and (tmp_path / "mine" / "model_index.json").is_file()


def test_diffusers_pipeline_class_is_the_base(pipe):
    assert isinstance(pipe, DiffusionPipeline) and pipe.components.keys() == {
        "transformer",
        "vae",
        "scheduler",
        "guide",
    }


# The documentation


def test_the_code_of_the_page_on_diffusers_runs_as_it_is_printed(make, tmp_path, monkeypatch, capsys):
    for package in ("peft", "imageio_ffmpeg"):
        pytest.importorskip(package, reason=f"the page uses {package}, which is not installed")
    page = Path(__file__).resolve().parents[2] / "docs" / "howto" / "diffusers.md"
    monkeypatch.chdir(tmp_path)
    make(class_names=["circle left", "square up", "c"]).save_pretrained("models/quickstart")
    Image.new("RGB", (32, 32), "red").save("picture.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    layer = {
        "transformer.blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 32),
        "transformer.blocks.0.attn.qkv.lora_B.weight": torch.ones(96, 2),
    }
    Path("models/mine_lora").mkdir()
    save_file(layer, "models/mine_lora/pytorch_lora_weights.safetensors")
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model that was never trained
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M):
            exec(compile(code, str(page), "exec"), names)
    assert [len(frames) for frames in names["result"].frames] == [5, 5, 5, 5]
    assert names["longer"].frames.shape == (1, 13, 32, 32, 3) and len(names["edited"].frames[0]) == 13
    assert "30 of 30" in capsys.readouterr().out
    with VideoReader("clip.mp4") as reader:
        assert len(reader) == 5
    assert (tmp_path / "mine" / "README.md").is_file()

"""The commands, called by their `main` in an empty folder."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from stdit.data import VideoReader
from stdit.data.manifest import read_manifest
from stdit.data.shapes import CLASS_NAMES
from stdit.data.video_write import write_video
from stdit.recipes import cache_latents, check_media, entry, evaluate, make_shapes, quickstart, sample, train
from stdit.sampling.pipeline import STDiTPipeline

TINY = """
name: t
data: {source: videos, root: shapes, manifest: manifest.jsonl, num_frames: 5, height: 32, width: 32, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 2, batch_size: 2, lr: 1.0e-3, samples: 2, sample_steps: 2, precision: fp32}
"""


@pytest.fixture(scope="module")
def drawn_shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "shapes"
    assert make_shapes.main(["--output", str(folder), "--num-clips", "24", "--frames", "5", "--size", "48"]) == 0
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch, drawn_shapes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    shutil.copytree(drawn_shapes, "shapes")
    return tmp_path


def test_shapes_are_drawn_with_a_manifest_of_the_truth(home, capsys):
    table = read_manifest(home / "shapes" / "manifest.jsonl")
    assert len(table.rows) == 24
    assert table.num_classes == 12
    row = json.loads((home / "shapes" / "manifest.jsonl").read_text().splitlines()[0])
    assert set(row["truth"]) == {"shape", "direction", "speed", "start", "size", "color", "background"}
    with VideoReader(table.rows[0].path) as reader:
        assert (len(reader), reader.size) == (5, (48, 48))
    assert make_shapes.main(["--output", "shapes", "--num-clips", "24", "--frames", "5", "--size", "48"]) == 0
    assert "already has these clips" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has clips of other settings"):
        make_shapes.main(["--output", "shapes", "--num-clips", "25"])
    with pytest.raises(ValueError, match="--num-clips must be >= 1, got 0"):
        make_shapes.main(["--output", "none", "--num-clips", "0"])


def test_more_clips_are_added_to_those_that_are_drawn_and_equal_those_of_a_fresh_folder(home, capsys):
    settings = ["--frames", "5", "--size", "48"]
    before = {path: path.stat().st_mtime_ns for path in Path("shapes").glob("*.mp4")}
    assert make_shapes.main(["--output", "shapes", "--num-clips", "27", *settings]) == 0
    assert make_shapes.main(["--output", "fresh", "--num-clips", "27", *settings]) == 0
    assert before.items() <= {path: path.stat().st_mtime_ns for path in Path("shapes").glob("*.mp4")}.items()
    names = sorted(path.name for path in Path("fresh").iterdir())
    assert names == sorted(path.name for path in Path("shapes").iterdir()) and len(names) == 29
    assert [n for n in names if (Path("fresh") / n).read_bytes() != (Path("shapes") / n).read_bytes()] == []
    with pytest.raises(ValueError, match="has clips of other settings"):
        make_shapes.main(["--output", "shapes", "--num-clips", "24", *settings])
    Path("shapes/manifest.jsonl").write_text("{}\n")  # rows that somebody has taken out are not drawn again
    with pytest.raises(ValueError, match="has clips of other settings"):
        make_shapes.main(["--output", "shapes", "--num-clips", "30", *settings])


def test_the_direction_of_bouncing_shapes_is_not_measured_and_old_labels_are_refused(home, monkeypatch):
    bounce = ["--output", "bounce", "--num-clips", "3", "--frames", "5", "--motion", "bounce"]
    make_shapes.main(bounce)
    with pytest.raises(ValueError, match="is not a shape and a direction"):
        evaluate.main(["--input", "bounce/manifest.jsonl"])
    settings = json.loads(Path("bounce/settings.json").read_text())
    Path("bounce/settings.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "labels"}))
    with pytest.raises(ValueError, match="has clips of other settings"):
        make_shapes.main(bounce)


def test_measured_shapes_agree_with_the_truth_of_drawn_files(home, capsys):
    make_shapes.main(["--output", "full", "--num-clips", "24"])
    assert evaluate.main(["--input", "full/manifest.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "shape right         24  100.0%" in out
    assert "direction right     24  100.0%" in out


def test_clips_of_one_frame_are_cached_and_train(home):
    assert cache_latents.main(["t.yaml", "data.num_frames=1", "--output", "stills"]) == 0
    assert train.main(["t.yaml", "data.root=stills", "data.source=latents", "data.num_frames=1", "name=stills"]) == 0


def test_cached_latents_train_like_the_clips_they_came_from(home):
    assert cache_latents.main(["t.yaml", "--output", "latents", "--shard-size", "10"]) == 0
    info = json.loads((home / "latents" / "cache.json").read_text())
    assert [shard["count"] for shard in info["shards"]] == [10, 10, 4]
    before = {p.name: p.stat().st_mtime_ns for p in (home / "latents").glob("latents-*.safetensors")}
    damaged = home / "latents" / info["shards"][1]["file"]
    damaged.write_bytes(b"damaged")
    assert cache_latents.main(["t.yaml", "--output", "latents", "--shard-size", "10"]) == 0
    after = {p.name: p.stat().st_mtime_ns for p in (home / "latents").glob("latents-*.safetensors")}
    assert [name for name in before if before[name] != after[name]] == [damaged.name]
    with pytest.raises(ValueError, match="made with other settings \\(num_frames"):
        cache_latents.main(["t.yaml", "data.num_frames=1", "--output", "latents", "--shard-size", "10"])
    from stdit.config import Config, load_typed
    from stdit.data.datasets import build_dataset
    from stdit.rng import keyed_rng
    from stdit.vae import load_vae

    config = load_typed(Config, "t.yaml")
    cached = build_dataset(load_typed(Config, "t.yaml", ["data.source=latents", "data.root=latents"]).data)
    clips = build_dataset(config.data)
    pixels = clips.load(13, keyed_rng("sample", 0, 13))["pixels"].permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    expected = load_vae("tiny").encode(pixels)[0]
    found = cached.load(13, None)["latents"].float()
    assert (found - expected).norm() / expected.norm() < 0.02
    assert cached.record(13)["label"] == clips.record(13)["label"]


def test_a_model_is_trained_found_and_sampled(home, capsys):
    with pytest.raises(ValueError, match="there is no model under models/; train one with make quickstart"):
        sample.main([])
    assert train.run(["t.yaml"]) == 0
    assert sample.main(["--class-label", "circle left", "7", "--steps", "2", "--seed", "3"]) == 0
    made = sorted((home / "output/t/samples").glob("*-seed-3-*"))
    assert [p.suffix for p in made] == [".json", ".mp4", ".json", ".mp4"]
    settings = json.loads(made[2].read_text())
    assert settings["label_name"] == sorted(CLASS_NAMES)[7]  # class names of a manifest are sorted
    assert settings["seed"] == 3
    resolved = {"guidance_scale": 2.0, "guider": "cfg", "guidance_interval": [0.0, 1.0], "solver": "euler"}
    assert settings.items() >= resolved.items() and "strength" not in settings
    with pytest.raises(ValueError, match="exists; choose another --output or --seed, or pass --overwrite"):
        sample.main(["--class-label", "circle left", "7", "--steps", "2", "--seed", "3"])
    assert sample.main(["--class-label", "0", "--frames", "1", "--steps", "1", "--output", "one.png"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(": one.png")
    assert (home / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert sample.main(["--class-label", "0", "--frames", "9", "--steps", "1", "--gif", "--output", "gifs"]) == 0
    with VideoReader(next((home / "gifs").glob("*.gif"))) as reader:
        assert len(reader) == 9
    with pytest.raises(ValueError, match="class label 'hexagon' is unknown"):
        sample.main(["--class-label", "hexagon"])
    with pytest.raises(ValueError, match="Use 1 or 5"):
        sample.main(["--frames", "2"])
    assert evaluate.main(["--clips", "12", "--steps", "1", "--size", "32"]) == 0
    assert (home / "output/t/evaluation.json").is_file()


def test_check_media_lists_files_that_cannot_be_read(home, capsys):
    assert check_media.main(["shapes"]) == 0
    (home / "shapes" / "bad.mp4").write_bytes(b"broken")
    assert check_media.main(["shapes", "--report", "report.jsonl"]) == 1
    assert "24 of 25 files read in full" in capsys.readouterr().out
    assert sum("refused" in line for line in (home / "report.jsonl").read_text().splitlines()) == 1


def test_images_train_through_the_same_code(home):
    overrides = [
        "data.source=shapes",
        "data.num_frames=1",
        "data.manifest=null",
        "objective.name=ddpm",
        "model.axes=[spatial]",
        "name=images",
    ]
    assert train.run(["t.yaml", *overrides]) == 0
    assert torch.load("output/images/generated_samples.pt", weights_only=True).shape == (2, 3, 1, 32, 32)
    assert list((home / "output/images/samples").glob("*.png"))


def test_a_vae_is_trained_stopped_and_resumed_exactly(home):
    import csv

    from safetensors.torch import load_file

    from stdit.recipes import average, train_vae
    from stdit.recipes.models import find_checkpoint, pipeline_of

    rows = [{"path": f"shapes/{i:06d}.mp4", "group": "held" if i < 2 else "seen"} for i in range(6)]
    make_shapes.main(["--output", "clips", "--num-clips", "6", "--size", "128"])
    rows = [{**row, "path": row["path"].replace("shapes", "clips")} for row in rows]
    with open("clips.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["path", "group"])
        writer.writeheader()
        writer.writerows(rows)
    (home / "v.yaml").write_text(
        "name: v\ndata: {root: ., manifest: clips.csv, hold_out: [held], short_sides: [64, 128]}\n"
        "model: {encoder_widths: [8, 8], decoder_widths: [8, 8, 8]}\ntrain: {steps: 4, checkpoint_every: 2, log_every: 1}\n"
    )
    assert train_vae.main(["v.yaml", "name=whole"]) == 0
    assert train_vae.main(["v.yaml", "name=parts", "train.steps=2"]) == 0
    assert train_vae.main(["v.yaml", "name=parts"]) == 0
    for file in (home / "checkpoints/whole/step-4").glob("*.safetensors"):
        one, two = load_file(file), load_file(home / "checkpoints/parts/step-4" / file.name)
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert train_vae.main(["v.yaml", "name=whole", "--export", "weights"]) == 0
    assert (home / "weights" / "training.json").is_file()

    decoder = ["v.yaml", "name=decoder", "init_from=weights", "train.decoder_only=true", "train.noisy_share=0.5"]
    decoder += ["train.scale_weight=0", "data.hold_out=[]"]  # PSNR is then that of training clips
    assert train_vae.main(decoder) == 0
    assert train_vae.main([*decoder, "--export", "again"]) == 0
    assert 0 < json.loads((home / "again" / "training.json").read_text())["psnr_64"] < 60
    before, after = (load_file(f"{folder}/diffusion_pytorch_model.safetensors") for folder in ("weights", "again"))
    changed = {key.split(".")[0] for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"decoder"}
    for overrides, message in (
        (["train.decoder_only=true"], "set init_from=tiny"),
        (["train.average_lengths=[0.05,0.1]"], "stdit average makes models of stdit train, and no VAEs"),
        (["data.hold_out=[held,seen]"], "leaves none of the 6 clips of 'clips.csv' to train on"),
        (["init_from=nosuch"], "^init_from 'nosuch' is not a folder"),
        (["init_from=nobody/nothing"], "'nobody/nothing' was not found .*; init_from=tiny works without any download"),
    ):
        with pytest.raises(ValueError, match=message):
            train_vae.main(["v.yaml", "name=none", *overrides])
    assert train_vae.main(["v.yaml", "name=shapes", "data.hold_out=[held,seen]", "data.share_shapes=1"]) == 0
    for command in (lambda: average.main(["whole"]), lambda: pipeline_of(find_checkpoint(Path("checkpoints/whole")))):
        with pytest.raises(ValueError, match="is no checkpoint of stdit train, but of stdit train-vae"):
            command()


def test_an_image_model_is_trained_and_inflated_by_config_alone(home, capsys):
    assert train.main(["t.yaml", "name=image", "data.num_frames=1", "train.samples=0"]) == 0
    video = ["t.yaml", "name=video", "init_from.path=models/image", "model.axes=[spatial,temporal]", "train.samples=0"]
    with pytest.raises(ValueError, match="model.depth=1 but init_from makes 2 blocks of 1; leave model.depth out"):
        train.main(video)
    assert train.main([*video, "model.depth=null"]) == 0
    assert "preserved of the image model: the output on every frame." in capsys.readouterr().out
    config = json.loads((home / "models/video/transformer/config.json").read_text())
    assert (config["depth"], config["block_sources"]) == (2, [0, None])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, drawn_shapes):
    folder, before = tmp_path_factory.mktemp("trained"), Path.cwd()
    (folder / "t.yaml").write_text(TINY)
    shutil.copytree(drawn_shapes, folder / "shapes")
    os.chdir(folder)
    try:
        assert train.run(["t.yaml", "objective.mask_strategy=mixed"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def model(home, trained):
    shutil.copytree(trained, home, dirs_exist_ok=True)
    return home


@pytest.mark.parametrize(
    ("task", "flags", "frames"),
    [
        ("animate", ["picture.png", "--class-label", "circle left", "square up"], 5),
        ("extend", ["shapes/000000.mp4", "--after", "8"], 13),
        ("extend", ["shapes/000000.mp4", "--before", "5", "--frames", "4"], 9),
        ("connect", ["shapes/000000.mp4", "shapes/000001.mp4", "--frames", "7"], 17),
        ("loop", ["shapes/000000.mp4", "--frames", "4"], 9),
        ("interpolate", ["shapes/000000.mp4", "--factor", "4"], 17),
        ("inpaint", ["shapes/000000.mp4", "--mask", "mask.png"], 5),
        ("inpaint", ["shapes/000000.mp4", "--mask", "mask.mp4"], 5),
        ("extend", ["shapes/000000.mp4", "--before", "1", "--after", "4", "--frames", "4"], 9),
        ("connect", ["picture.png", "picture.png", "--frames", "3"], 5),
        ("inpaint", ["shapes/000000.mp4", "--width", "64"], 5),
        ("edit", ["shapes/000000.mp4", "--strength", "0.5", "--class-label", "square up"], 5),
    ],
)
def test_every_task_writes_clips_of_the_right_length_size_and_rate(model, task, flags, frames, capsys):
    Image.new("RGB", (48, 48), "red").save("picture.png")
    mask = Image.new("L", (48, 48), 0)
    mask.paste(255, (0, 0, 24, 24))
    mask.save("mask.png")
    write_video("mask.mp4", np.repeat(np.asarray(mask.convert("RGB"))[None], 5, 0))
    inputs = [flag for flag in flags if flag.endswith((".mp4", ".png")) and not flag.startswith("mask.")]
    rest = [flag for flag in flags if flag not in inputs]
    arguments = ["--task", task, "--input", *inputs, *rest, "--steps", "2", "--output", "made"]
    assert sample.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "48 x 48 -> 32 x 32" in printed  # resampling is noted
    written = sorted((model / "made").glob("*.mp4"))
    assert len(written) == (2 if task == "animate" else 1)
    with VideoReader(written[0]) as reader:
        assert len(reader) == frames
        assert reader.size == ((32, 64) if "--width" in flags else (32, 32))
        assert round(reader.fps, 3) == (32 if task == "interpolate" else 8)
    with pytest.raises(ValueError, match="exists; choose another"):
        sample.main([*arguments, "--seed", re.search(r"seed (\d+): ", printed)[1]])


def test_a_seed_is_drawn_and_printed_and_gives_the_same_clip_again(model, capsys):
    def made(path, *more):
        assert sample.main(["--class-label", "0", "--steps", "1", "--output", path, *more]) == 0
        return re.search(r"seed (\d+): ", capsys.readouterr().out)[1], Path(path).read_bytes()

    (seed, first), (other, second) = made("a.mp4"), made("b.mp4")
    assert seed != other and first != second
    assert made("c.mp4", "--seed", seed) == (seed, first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "extend", "--input", "shapes/000000.mp4"], "after=0 and before=0"),
        (["--task", "extend", "--after", "4"], "takes 1 --input file"),
        (["--task", "connect", "--input", "shapes/000000.mp4"], "takes 2 --input file"),
        (["--task", "loop", "--input", "shapes/000000.mp4", "--after", "4"], "--after belongs to --task extend"),
        (["--task", "extend", "--input", "none.mp4", "--after", "4"], "none.mp4"),
        (
            ["--task", "edit", "--input", "shapes/000000.mp4", "--strength", "2"],
            "strength must be a noise level .* got 2.0",
        ),
        (
            ["--task", "edit", "--input", "shapes/000000.mp4", "--frames", "9"],
            "has 5 frames at 8 fps, but --frames is 9",
        ),
        (
            ["--task", "inpaint", "--input", "shapes/000000.mp4", "--mask", "odd.png"],
            "mask odd.png is 7 x 9, but the clip is 48 x 48",
        ),
        (["--task", "inpaint", "--input", "shapes/000000.mp4"], "needs a --mask, or room around"),
        (
            ["--task", "inpaint", "--input", "shapes/000000.mp4", "--mask", "short.mp4"],
            "has 3 frames at 8 fps, but the clip has 5",
        ),
        (
            ["--task", "edit", "--input", "odd.png", "--frames", "9"],
            "odd.png is an image of one frame, but --frames is 9",
        ),
        (
            ["--task", "extend", "--input", "shapes/000000.mp4", "--frames", "-1", "--after", "4"],
            "--frames must be >= 1, got -1",
        ),
        (["--task", "loop", "--input", "shapes/000000.mp4", "--frames", "0"], "--frames must be >= 1, got 0"),
        (["--height", "0"], "--height must be >= 1, got 0"),
        (["--fps", "-3"], "--fps must be a positive number, got -3.0"),
        (["--fps", "inf"], "--fps must be a positive number, got inf"),
        (["--guidance", "nan"], "must be >= 0, got nan"),
        (["--seed", "-1"], "seed must be >= 0, got -1"),
        (["--tile", "2"], "tile must be >= 3, got 2"),
        (["--pos-scaling", "squeezed"], "Unknown pos_scaling 'squeezed'"),
        (
            ["--class-label", "0", "1", "2", "--num-videos", "2"],
            "--num-videos 2 is less than the 3 labels or captions",
        ),
    ],
)
def test_impossible_tasks_are_refused_before_anything_is_written(model, arguments, message):
    Image.new("L", (9, 7)).save("odd.png")
    write_video("short.mp4", np.zeros((3, 48, 48, 3), np.uint8))
    with pytest.raises((ValueError, OSError), match=message):
        sample.main([*arguments, "--output", "made"])
    assert not (model / "made").exists() or not list((model / "made").iterdir())


def test_gif_contradicts_an_output_of_another_type(model):
    with pytest.raises(ValueError, match="--gif and --output made.mp4 contradict each other"):
        sample.main(["--gif", "--output", "made.mp4"])


def test_outpainting_keeps_the_whole_image_and_gives_an_image(model, capsys):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :8], picture[:, -8:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(picture).save("wide.png")
    arguments = ["--task", "inpaint", "--input", "wide.png", "--height", "64", "--width", "64", "--steps", "1"]
    assert sample.main([*arguments, "--output", "square.png"]) == 0
    assert "cropped" not in capsys.readouterr().out
    made = np.asarray(Image.open("square.png"))
    assert made.shape == (64, 64, 3)
    assert np.array_equal(made[16:48], picture)


def test_existing_files_and_unknown_file_types_are_refused_before_sampling(model, monkeypatch):
    Path("mine.json").write_text("{}")
    monkeypatch.setattr(STDiTPipeline, "fill", None)
    for output, message in (
        ("mine.mp4", "mine.json exists"),
        ("x.webm", "cannot write .webm"),
        ("z.json", "cannot write"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main(["--class-label", "0", "--output", output])
    assert Path("mine.json").read_text() == "{}"


def test_a_folder_may_have_a_point_in_its_name(model):
    Path("made.v2").mkdir()
    for output in ("made.v2", "runs/v1.0/"):
        arguments = ["--class-label", "0", "--frames", "5", "--steps", "1", "--gif", "--output", output]
        assert sample.main(arguments) == 0
        assert {path.suffix for path in Path(output).iterdir()} == {".gif", ".json"}


def test_the_quickstart_refuses_what_training_would_before_it_draws_clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/quickstart").mkdir(parents=True)

    def drawn(argv):
        raise AssertionError("clips were drawn")

    monkeypatch.setattr(make_shapes, "main", drawn)
    with pytest.raises(ValueError, match="models/quickstart holds a model that no run of this name wrote"):
        quickstart.main([])
    with pytest.raises(ValueError, match="train.stesp"):
        quickstart.main(["name=other", "train.stesp=3"])
    for mine in ("name=other", "train.resume=never"):
        with pytest.raises(AssertionError, match="clips were drawn"):
            quickstart.main([mine])


def test_the_quickstart_shows_each_task_with_its_new_frames_marked(model):
    pipe = STDiTPipeline.from_pretrained("models/t")
    pipe.register_to_config(num_frames=17)
    quickstart.show_tasks(pipe, model)
    assert Image.open("tasks.png").size[1] > 4 * 32
    for name, frames in (("extended", 17), ("connected", 17), ("loop", 13), ("animated", 17)):
        with VideoReader(f"{name}.mp4") as reader:
            assert len(reader) == frames


@pytest.mark.parametrize("packing", ["false", "true"])
def test_clips_and_images_of_many_sizes_train_in_one_run(home, packing, capsys):
    for i in range(6):
        Image.new("RGB", (60, 40), (i * 40, 0, 0)).save(f"shapes/{i}.png")
    sizes = "[[1, 32, 32], [5, 32, 32], [1, 32, 48], [5, 16, 16]]"
    common = [
        "t.yaml",
        "data.manifest=null",
        f"data.sizes={sizes}",
        "train.tokens=48",
        f"data.packing={packing}",
        "train.samples=2",
    ]
    region = f"objective.mask_probs.region={0 if packing == 'true' else 5}"  # buckets support per-patch levels, packing does not
    mixed = ["objective.mask_strategy=mixed", region, "model.micro_conditions=[fps,seconds,height,width]"]
    assert train.run([*common, *mixed, "train.steps=6", "train.batch_size=1"]) == 0
    printed = capsys.readouterr().out
    assert "1 x 32 x 48: 6 clips" in printed
    rows = Path("output/t/training_metrics.csv").read_text().splitlines()
    assert len(rows) == 7
    assert "nan" not in rows[-1].split(",")[1]
    assert train.run([*common, "name=u", "train.micro_batch=1"]) == 1
    assert "train.micro_batch=null" in capsys.readouterr().err


def test_packing_refuses_per_patch_levels(home, capsys):
    packed = ["data.sizes=[[5, 32, 32]]", "train.tokens=48", "data.packing=true", "objective.mask_strategy=mixed"]
    assert train.run(["t.yaml", *packed]) == 1
    assert "set objective.mask_probs.region=0" in capsys.readouterr().err


def test_an_error_is_written_at_once_so_that_lines_of_processes_stay_apart(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))

    def main(_):
        raise ValueError("a reason; a remedy")

    assert entry.run(main) == 1
    assert written == ["a reason; a remedy\n"]

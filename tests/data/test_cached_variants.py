"""Caches of latents of several sizes, several windows of a clip, and mirrored clips."""

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from media import write_barcodes
from safetensors.torch import load_file

from stdit.config import Config, load_typed
from stdit.data import cache_locks
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.holdout import split
from stdit.data.samplers import ClipSize
from stdit.data.variants import ClipVariants
from stdit.data.video_io import VideoError
from stdit.files import claimed
from stdit.pixels import to_float
from stdit.recipes import cache_latents, train
from stdit.recipes.build import build_captions
from stdit.recipes.shard_folder import draw_of
from stdit.rng import keyed_rng
from stdit.text import CaptionCache, HashedWordEncoder
from stdit.vae import load_vae

SIZES = [[5, 32, 32], [9, 32, 48], [1, 32, 32]]
CONFIG = f"""
name: t
data: {{root: clips, num_frames: 5, height: 32, width: 32, sizes: {SIZES}, workers: 0}}
model: {{size: S/2, depth: 1, hidden_size: 32, num_heads: 2}}
train: {{steps: 4, tokens: 64, batch_size: 4, lr: 1.0e-3, checkpoint_every: 2, log_every: 2, preview_every: 100, samples: 0,
        precision: fp32}}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    for i, count in enumerate((12, 20, 6, 9, 3, 30)):
        write_barcodes(tmp_path / f"clips/{i}.mp4", count)
    (tmp_path / "t.yaml").write_text(CONFIG)
    return tmp_path


def cache(*arguments):
    return cache_latents.main(["t.yaml", *arguments, "--output", "latents", "--shard-size", "2"])


def encoded(dataset, index, size=None):
    """The latents of a clip, as the cache is to hold them."""
    pixels = dataset.load(index, keyed_rng("sample", 0, *draw_of(dataset, index)), size)["pixels"]
    with torch.no_grad():
        return load_vae("tiny").encode(to_float(pixels[None]))[0].half()


def test_a_cache_holds_every_clip_at_the_size_of_its_bucket(home):
    assert cache() == 0
    raw = build_dataset(DataConfig(root="clips", sizes=SIZES))
    cached = build_dataset(DataConfig(root="latents", sizes=SIZES))
    assert len(cached) == 6 and {cached.shape(i) for i in range(6)} <= {tuple(size) for size in SIZES}
    assert cached.shapes().tolist() == [list(cached.shape(i)) for i in range(6)]
    found = [cached.load(i, np.random.default_rng(0), ClipSize(*cached.shape(i)))["latents"] for i in range(6)]
    wanted = []
    for i in range(6):
        for size in SIZES:
            with suppress(VideoError):  # a clip that is shorter than this size
                wanted.append(encoded(raw, i, ClipSize(*size)))
    for latents in found:
        assert any(latents.shape == other.shape and (latents - other).abs().max() < 0.3 for other in wanted)
    with pytest.raises(ValueError, match="holds latents of size"):
        cached.load(0, np.random.default_rng(0), ClipSize(33, 32, 32))


@pytest.mark.parametrize("packing", ["false", "true"])
def test_buckets_and_packs_train_from_a_cache_of_several_sizes_and_resume(home, packing):
    assert cache() == 0
    settings = ["t.yaml", "data.root=latents", f"data.packing={packing}"]
    assert train.run([*settings, "name=whole"]) == 0
    assert train.run([*settings, "name=parts", "train.steps=2"]) == 0
    assert train.run([*settings, "name=parts"]) == 0
    rows = [(home / f"output/{name}/training_metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]]


def test_clips_keep_their_sizes_and_latents_when_others_come_and_go(home, capsys):
    (home / "t.yaml").write_text(CONFIG.replace(str(SIZES), "[[5, 32, 32], [9, 32, 32]]"))
    for i in range(6):
        write_barcodes(home / f"clips/{i}.mp4", 12 + i)  # each fits both sizes
    assert cache() == 0
    (home / "clips/0.mp4").unlink()
    (home / "clips/3.mp4").rename(home / "clips/03.mp4")
    write_barcodes(home / "clips/00.mp4", 20)
    capsys.readouterr()
    assert cache() == 0
    said = capsys.readouterr().out
    assert "4 clips kept, 2 encoded" in said or "5 clips kept, 1 encoded" in said  # a new name may draw another size


def test_windows_of_a_clip_are_samples_and_mirrored_ones_are_mirrored(home):
    settings = ("data.sizes=[]",)
    assert cache(*settings, "--windows", "3", "--mirrored") == 0
    raw = build_dataset(DataConfig(root="clips", num_frames=5, height=32, width=32))
    cached = build_dataset(DataConfig(root="latents", num_frames=5, height=32, width=32))
    variants = ClipVariants(raw, 3, True)
    good = [i for i in range(len(variants)) if variants.dataset.shape(i // 6)[0] >= 5]
    assert len(cached) == len(good) == 30 and len(variants) == 36
    for row, i in enumerate(good[:12]):
        latents = cached.load(row, np.random.default_rng(0))["latents"]
        # The cache is encoded in bfloat16 where the machine has it.
        assert (latents - encoded(variants, i)).abs().max() < 0.1
        plain, window = (draw_of(variants, i - i % 2), draw_of(variants, i))
        assert plain == window and window.window == i % 6 // 2
    pixels = [variants.load(i, keyed_rng("sample", 0, *draw_of(variants, i)))["pixels"] for i in good[:2]]
    assert torch.equal(pixels[0].flip(2), pixels[1])
    assert not torch.equal(*(cached.load(row, np.random.default_rng(0))["latents"] for row in (0, 1)))


def test_a_mirrored_cache_answers_data_flip_when_it_is_made_and_when_it_is_trained_from(home):
    with pytest.raises(ValueError, match="data.flip=true would be drawn once .* add --mirrored for both"):
        cache("data.sizes=[]", "data.flip=true")
    assert cache("data.sizes=[]", "data.flip=true", "--mirrored") == 0
    (home / "latents").rename("flipped")
    assert cache("data.sizes=[]", "--mirrored") == 0
    size = {"num_frames": 5, "height": 32, "width": 32}
    flipped, plain = (build_dataset(DataConfig(root=root, flip=True, **size)) for root in ("flipped", "latents"))
    assert len(flipped) == len(plain) == 10 and flipped.info["flip"] is False
    for i in range(10):  # nothing is drawn, and nothing is mirrored again
        loaded = [
            cached.load(i, np.random.default_rng(seed))["latents"] for seed, cached in enumerate((flipped, plain))
        ]
        assert torch.equal(*loaded)
    options = ["data.sizes=[]", "train.tokens=null", "data.root=flipped", "data.flip=true", "train.steps=2"]
    assert train.run(["t.yaml", *options]) == 0
    (home / "latents").rename("mirrored")
    assert cache("data.sizes=[]") == 0
    with pytest.raises(
        ValueError, match="data.flip=true cannot change the latents .* cache them again with --mirrored"
    ):
        build_dataset(DataConfig(root="latents", flip=True, **size))


def test_clips_with_actions_are_not_mirrored_for_data_flip(home):
    rows = [{"path": f"{i}.mp4", "actions": [0] * 12} for i in (0, 1)]
    (home / "clips/list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match="leave out --mirrored"):
        cache("data.sizes=[]", "data.manifest=clips/list.jsonl", "data.flip=true", "--mirrored")
    assert not (home / "latents").exists()


def test_the_same_command_keeps_what_is_there_and_another_setting_is_refused(home, capsys):
    assert cache() == 0
    before = (home / "latents/cache.json").read_bytes()
    capsys.readouterr()
    assert cache() == 0
    assert "6 clips kept, 0 encoded" in capsys.readouterr().out
    assert (home / "latents/cache.json").read_bytes() == before
    for arguments, name in (
        (["--windows", "2"], "windows"),
        (["--mirrored"], "mirrored"),
        (["data.sizes=[[5,32,32]]"], "sizes"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings .*{name}"):
            cache(*arguments)


@pytest.fixture
def image_vae(home):
    """A folder with a tiny image VAE of random weights, whose posterior is wide."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    vae.save_pretrained(home / "vae")
    return ("vae.name=vae", "data.sizes=[]", "data.cache_dtype=float32")


def test_a_cache_of_moments_draws_latents_by_key_at_every_step(home, image_vae):
    assert cache(*image_vae, "data.cache_posterior=moments") == 0
    (home / "latents").rename("moments")
    assert cache(*image_vae) == 0
    mean, moments = (
        build_dataset(DataConfig(root=root, num_frames=5, height=32, width=32)) for root in ("latents", "moments")
    )
    stored = load_file(home / "moments" / moments.info["shards"][0]["file"])
    center = mean.load(0, None)
    assert stored.keys() == {"latents", "latents_std", "reencoded", "reencoded_std"}
    assert torch.equal(stored["latents"][0], center["latents"]) and stored["latents_std"].min() > 0
    first, again, other = (moments.load(0, keyed_rng("sample", 0, step, 3)) for step in (0, 0, 1))
    assert torch.equal(first["latents"], again["latents"]) and not torch.equal(first["latents"], other["latents"])
    assert torch.equal(first["latents"][:, 0], first["reencoded"][:, 0])
    drawn = torch.stack([moments.load(0, keyed_rng("sample", 0, step, 3))["latents"] for step in range(200)])
    assert torch.allclose(drawn.std(0).mean(), stored["latents_std"][0].mean(), rtol=0.05)
    assert torch.allclose(drawn.mean(0), center["latents"], atol=float(0.3 * stored["latents_std"].max()))
    assert train.run(["t.yaml", *image_vae, "train.tokens=null", "data.root=moments", "train.steps=2"]) == 0


def test_a_cache_of_samples_has_one_draw_of_every_clip(home, image_vae):
    assert cache(*image_vae, "data.cache_posterior=sample") == 0
    (home / "latents").rename("before")
    assert cache(*image_vae, "data.cache_posterior=sample") == 0
    with pytest.raises(ValueError, match="made with other settings .*posterior"):
        cache(*image_vae)
    (home / "latents").rename("after")
    assert cache(*image_vae) == 0
    before, after, mean = (
        build_dataset(DataConfig(root=root, num_frames=5, height=32, width=32)).load(0, None)["latents"]
        for root in ("before", "after", "latents")
    )
    assert torch.equal(before, after) and not torch.equal(before, mean)


def test_a_vae_without_a_posterior_cannot_give_moments(home):
    with pytest.raises(ValueError, match="data.cache_posterior=moments needs a VAE that has a posterior, and 'tiny'"):
        cache("data.cache_posterior=moments")
    assert not (home / "latents").exists()


def test_a_run_of_other_sizes_is_told_those_of_the_cache(home):
    assert cache() == 0
    with pytest.raises(
        ValueError, match=r"are of the sizes \[\[5, 32, 32\], \[9, 32, 48\], \[1, 32, 32\]\]; set data.sizes"
    ):
        build_dataset(DataConfig(root="latents", num_frames=5, height=32, width=32))
    assert json.loads((home / "latents/cache.json").read_text())["sizes"] == SIZES


def test_mirrored_clips_with_actions_are_refused(home):
    class Acted:
        num_classes, class_names, action_space = 0, None, object()

    with pytest.raises(ValueError, match="leave out --mirrored"):
        ClipVariants(Acted(), 1, True)


def test_a_shard_that_another_process_writes_is_left_to_it(home, capsys):
    (home / "latents").mkdir()
    with claimed([home / "latents/latents-00001.safetensors"]):
        assert cache() == 0
    said = capsys.readouterr().out
    assert "1 shards were being written by another process" in said and not (home / "latents/cache.json").exists()
    assert cache() == 0 and len(build_dataset(DataConfig(root="latents", sizes=SIZES))) == 6


def test_files_that_two_processes_replace_stay_for_runs_that_read_them(home, monkeypatch):
    assert cache("data.sizes=[]") == 0
    before = {path.name for path in (home / "latents").glob("*.safetensors")}
    write_barcodes(home / "clips/0.mp4", 15)  # its shard is made again, and so is the table
    write, others = cache_latents.write_shards, [lambda: cache("data.sizes=[]")]

    def after_another_process(*args, **options):
        if others:
            assert others.pop()() == 0
        return write(*args, **options)

    monkeypatch.setattr(cache_latents, "write_shards", after_another_process)
    assert cache("data.sizes=[]") == 0
    files = {path.name for path in (home / "latents").glob("*.safetensors")}
    assert before < files
    assert cache("data.sizes=[]") == 0
    left = {path.name for path in (home / "latents").glob("*.safetensors")}
    assert not before <= left and left < files


def test_a_lock_that_cannot_be_taken_or_tried_is_a_warning_for_a_reader_and_held_for_an_update(home, monkeypatch):
    assert cache("data.sizes=[]") == 0
    config = DataConfig(root="latents")
    for error in (OSError(37, "No locks available"), NotImplementedError("flock"), PermissionError(13, "denied")):
        with monkeypatch.context() as patched:

            def refused(*_, error=error, **__):
                raise error

            patched.setattr(cache_locks.FileLock, "acquire", refused)
            with pytest.warns(UserWarning, match="latents cannot be locked here"), cache_locks.reading(config):
                pass
            (home / "latents/.reader-0.lock").touch()
            assert cache_locks.is_locked(home / "latents", "reader")
            with (
                pytest.raises(ValueError, match="latents cannot be locked"),
                cache_locks.lock_of(home / "latents", "writer"),
            ):
                pass
    assert not cache_locks.is_locked(home / "latents", "reader")  # left by a process that was killed
    assert not list((home / "latents").glob(".*.lock"))


def test_a_training_goes_on_while_its_cache_is_brought_up_to_date_again_and_again(home, monkeypatch):
    latents, fit = home / "latents", train.fit
    options = ["data.sizes=[]", "train.tokens=null"]
    assert cache(*options) == 0
    given = ["t.yaml", *options, "data.root=latents"]
    assert train.run([*given, "name=alone"]) == 0

    def after_updates(run):
        for frames in (15, 18, 21):  # every clip becomes another, three times
            for i in range(6):
                write_barcodes(home / f"clips/{i}.mp4", frames + i)
            assert cache(*options) == 0
        return fit(run)

    monkeypatch.setattr(train, "fit", after_updates)
    assert train.run([*given, "name=beside"]) == 0
    alone, beside = ((home / f"output/{name}/training_metrics.csv").read_text() for name in ("alone", "beside"))
    assert [row.split(",")[1] for row in alone.splitlines()] == [row.split(",")[1] for row in beside.splitlines()]
    assert len(list(latents.glob("clips-*.safetensors"))) == 4 and not list(latents.glob(".reader-*"))
    assert cache(*options) == 0
    assert len(list(latents.glob("clips-*.safetensors"))) <= 2  # what the last update replaced, and what it made
    assert cache(*options) == 0 and len(list(latents.glob("clips-*.safetensors"))) == 1


def test_windows_of_one_clip_are_held_out_together(home):
    assert cache("data.sizes=[]", "--windows", "3") == 0
    cached = build_dataset(DataConfig(root="latents", num_frames=5, height=32, width=32))
    kept, held = split(cached, 0.3)
    groups = [{part.dataset.group_of(int(i)) for i in part.indices} for part in (kept, held)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]
    assert sum(kept.shards) == len(kept) and len(kept.shards) == len(cached.shards)


def test_latents_in_float32_train_as_the_clips_themselves(home):
    for path in (home / "clips").iterdir():
        path.unlink()
    for i in range(4):
        write_barcodes(home / f"clips/{i}.mp4", 5)  # one window each
    plain = ["t.yaml", "data.sizes=[]"]
    assert cache_latents.main([*plain, "data.cache_dtype=float32", "--output", "exact"]) == 0
    assert cache(*plain[1:]) == 0
    exact, half = (
        build_dataset(DataConfig(root=root, num_frames=5, height=32, width=32)) for root in ("exact", "latents")
    )
    rng = np.random.default_rng(0)
    assert exact.load(0, rng)["latents"].dtype == torch.float32 and half.load(0, rng)["latents"].dtype == torch.float16
    losses = {}
    for name, root in (("raw", "clips"), ("exact", "exact")):
        options = ["train.tokens=null", "train.steps=2", "train.log_every=1", f"data.root={root}", f"name={name}"]
        assert train.run([*plain, *options]) == 0
        rows = (home / f"output/{name}/training_metrics.csv").read_text().splitlines()
        losses[name] = np.array([float(row.split(",")[rows[0].split(",").index("loss")]) for row in rows[1:]])
    assert len(losses["raw"]) == 2
    assert np.abs(losses["exact"] - losses["raw"]).max() <= 1e-6
    with pytest.raises(ValueError, match=r"made with other settings .*dtype"):
        cache_latents.main([*plain, "--output", "exact"])
    with pytest.raises(ValueError, match="cache_dtype"):
        cache_latents.main([*plain, "data.cache_dtype=int8", "--output", "none"])


def test_captions_are_encoded_with_the_latents_and_found_by_training(home, monkeypatch):
    for i in range(6):
        (home / f"clips/{i}.txt").write_text(f"caption {i % 4}")
    words = ["data.sizes=[]", "text.encoder=words", "model.conditioning=adaln_single"]
    assert cache(*words) == 0
    monkeypatch.setattr(HashedWordEncoder, "encode", None)
    found = CaptionCache(home / Config().text.cache, HashedWordEncoder())
    assert len(found) == 5
    build_captions(
        load_typed(Config, "t.yaml", [*words, "data.root=latents"]),
        build_dataset(DataConfig(root="latents", num_frames=5, height=32, width=32)),
        "cpu",
    )
    for i in range(6):
        (home / f"clips/{i}.txt").unlink()
    with pytest.raises(ValueError, match="no clip of 'clips' has a caption"):
        cache_latents.main(["t.yaml", *words, "--output", "other"])
    assert not list((home / "other").glob("latents-*"))


def test_a_share_to_hold_out_that_leaves_no_clip_is_refused_before_any_is_encoded(home, monkeypatch):
    monkeypatch.setattr(cache_latents, "load_vae", None)
    with pytest.raises(ValueError, match="leaves no clip to train on"):
        cache("train.holdout=0.99")
    assert not (home / "latents").exists()


def test_a_cache_keeps_the_column_by_which_clips_are_held_out(home, capsys):
    rows = [
        {
            "path": f"{i}.mp4",
            "scene": "indoors" if i in (1, 5) else "street",
            "place": i,
            "label": "run" if i == 5 else "walk",
        }
        for i in (0, 1, 2, 5)
    ]
    (home / "clips/list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (home / "t.yaml").write_text(CONFIG.replace(f"sizes: {SIZES}, ", "manifest: clips/list.jsonl, "))
    assert cache("--windows", "2") == 0
    latents = build_dataset(DataConfig(root="latents", source="latents", num_frames=5, height=32, width=32))
    with pytest.raises(ValueError, match="'scene' is no column .* once stdit cache-latents, run again"):
        split(latents, 0.0, "scene", ["indoors"])
    capsys.readouterr()
    assert cache("--windows", "2", "train.holdout_column=scene", "train.holdout_values=[indoors]") == 0
    assert "8 clips kept, 0 encoded" in capsys.readouterr().out
    latents = build_dataset(DataConfig(root="latents", source="latents", num_frames=5, height=32, width=32))
    train_on, held = split(latents, 0.0, "scene", ["indoors"])
    assert (len(train_on), len(held)) == (4, 4)
    assert {latents.group_of(i) for i in held.indices} == {"1.mp4", "5.mp4"}
    # A further column comes beside the first, and the name of the class is one, too.
    with pytest.warns(UserWarning, match="train.holdout_values has 'elsewhere', which no clip here has"):
        assert cache("--windows", "2", "train.holdout_column=place", "train.holdout_values=[elsewhere]") == 0
    assert cache("--windows", "2", "train.holdout_column=place", "train.holdout_values=[5]") == 0
    latents = build_dataset(DataConfig(root="latents", source="latents", num_frames=5, height=32, width=32))
    assert len(split(latents, 0.0, "scene", ["indoors"])[1]) == 4
    assert len(split(latents, 0.0, "place", ["5"])[1]) == 2
    assert len(split(latents, 0.0, "label", ["walk"])[1]) == 6
    with pytest.raises(ValueError, match="it has label, scene, place. Leave it out"):
        split(latents, 0.5, "seed")

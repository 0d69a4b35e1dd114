"""LeRobot datasets as they lie on disk, in both layouts, made here as LeRobot documents them."""

import json

import numpy as np
import pytest
from media import read_barcode, write_barcodes

from stdit.conditions import Actions
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.holdout import split
from stdit.data.loader import KeyedSamples
from stdit.data.samplers import UniformSampler
from stdit.recipes import cache_latents
from stdit.rng import keyed_rng

pyarrow = pytest.importorskip("pyarrow", reason="the extra [lerobot] is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

CAMERA, LENGTHS = "observation.images.front", (12, 15)
FEATURES = {
    CAMERA: {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channels"]},
    "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["left", "right"]}},
}


def write_table(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)


def steps(episode):
    length = LENGTHS[episode]
    return {
        "episode_index": [episode] * length,
        "frame_index": list(range(length)),
        "action": [[float(frame), float(10 * episode)] for frame in range(length)],
    }


def write_info(root, version, **paths):
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": version, "fps": 24, "chunks_size": 1000, "features": FEATURES, **paths}
    (root / "meta/info.json").write_text(json.dumps(info))


def make_v21(root):
    write_info(
        root, "v2.1", data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )  # fmt: skip
    lines, stats = [], []
    for episode, length in enumerate(LENGTHS):
        write_table(root / f"data/chunk-000/episode_{episode:06d}.parquet", steps(episode))
        video = root / f"videos/chunk-000/{CAMERA}/episode_{episode:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        write_barcodes(video, length)
        lines.append(json.dumps({"episode_index": episode, "tasks": [f"task {episode}"], "length": length}))
        low, high = [0.0, 10.0 * episode], [length - 1.0, 10.0 * episode]
        stats.append(json.dumps({"episode_index": episode, "stats": {"action": {"min": low, "max": high}}}))
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    (root / "meta/episodes_stats.jsonl").write_text("\n".join(stats))


def make_v30(root):
    write_info(
        root, "v3.0", data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )  # fmt: skip
    both = [steps(episode) for episode in range(2)]
    write_table(root / "data/chunk-000/file-000.parquet", {key: both[0][key] + both[1][key] for key in both[0]})
    video = root / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    video.parent.mkdir(parents=True)
    write_barcodes(video, sum(LENGTHS))
    prefix = f"videos/{CAMERA}"
    write_table(
        root / "meta/episodes/chunk-000/file-000.parquet",
        {
            "episode_index": [0, 1], "length": list(LENGTHS), "tasks": [["task 0"], ["task 1"]],
            "data/chunk_index": [0, 0], "data/file_index": [0, 0], f"{prefix}/chunk_index": [0, 0],
            f"{prefix}/file_index": [0, 0], f"{prefix}/from_timestamp": [0.0, LENGTHS[0] / 24],
        },
    )  # fmt: skip
    (root / "meta/stats.json").write_text(json.dumps({"action": {"min": [0.0, 0.0], "max": [14.0, 10.0]}}))


@pytest.fixture(params=[make_v21, make_v30], ids=["v2.1", "v3.0"])
def root(request, tmp_path):
    request.param(tmp_path / "robot")
    return tmp_path / "robot"


def dataset(root, **changes):
    return build_dataset(DataConfig(root=str(root), num_frames=9, height=48, width=64, **changes))


def test_an_episode_has_its_own_frames_and_the_action_of_the_frame_before(root):
    found = dataset(root)
    assert len(found) == 2 and found.shape(1) == (15, 48, 64) and found.rates == [24.0]
    first = 0 if "v2.1" in (root / "meta/info.json").read_text() else LENGTHS[0]
    for seed in range(5):
        sample = found.load(1, keyed_rng("sample", seed))
        numbers = [read_barcode(frame) - first for frame in sample["pixels"].numpy()]
        assert numbers == list(range(numbers[0], numbers[0] + 9)) and numbers[-1] < 15
        read = Actions.read(found.record(1), sample["clip"])
        assert read == [None, *([float(number - 1), 10.0] for number in numbers[1:])]
    assert found.record(0)["caption"] == "task 0"


def test_episodes_are_held_out_one_by_one_also_where_a_file_holds_many(root):
    found = dataset(root)
    assert [found.group_of(i) for i in range(2)] == [found.identity(i).source for i in range(2)]
    kept, held = split(found, 0.5)
    assert len(kept) == len(held) == 1


def test_the_space_has_the_robots_names_and_the_bounds_of_the_data(root):
    space = dataset(root).action_space
    assert (space.width, list(space.names)) == (2, ["left", "right"])
    assert (space.low, space.high) == ([0.0, 0.0], [14.0, 10.0])


def test_its_latents_can_be_cached_with_the_actions(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = "name: t\ndata: {root: robot, num_frames: 9, height: 32, width: 32, workers: 0}\n"
    (tmp_path / "t.yaml").write_text(config)
    assert cache_latents.main(["t.yaml", "--output", "latents"]) == 0
    info = json.loads((tmp_path / "latents/cache.json").read_text())
    assert info["action_space"]["names"] == ["left", "right"]
    cached = build_dataset(DataConfig(root="latents", num_frames=9, height=32, width=32))
    assert all(np.shape(cached.record(i)["conditions"]["actions"][1:]) == (8, 2) for i in range(info["clips"]))


@pytest.mark.parametrize("damaged", ["table", "numbers", "video"])
def test_an_episode_whose_table_or_video_is_damaged_is_set_aside(damaged, tmp_path, monkeypatch, capsys):
    make_v21(tmp_path / "robot")
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "robot/data/chunk-000/episode_000001.parquet"
    if damaged == "numbers":
        write_table(table, {**steps(1), "action": [[1.0]] * LENGTHS[1]})
    else:
        path = table if damaged == "table" else tmp_path / f"robot/videos/chunk-000/{CAMERA}/episode_000001.mp4"
        path.write_bytes(b"PAR1damaged")
    found = dataset(tmp_path / "robot")
    samples = KeyedSamples(found, 0, UniformSampler(0, 2, 2))
    loaded = [samples[0, slot] for slot in range(2)]
    assert [list(one["bad"]) for one in loaded if one["bad"]] == [[found.name(1)]]
    assert all(len(one["conditions"]["actions"]) == 9 for one in loaded)
    (tmp_path / "t.yaml").write_text("name: t\ndata: {root: robot, num_frames: 9, height: 32, width: 32, workers: 0}\n")
    assert cache_latents.main(["t.yaml", "--output", "latents"]) == 0
    info = json.loads((tmp_path / "latents/cache.json").read_text())
    assert info["clips"] == 1 and list(info["skipped"]) == [found.name(1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: edit(root, codebase_version="v9.0"), "layout v9.0 is unknown"),
        (lambda root: edit(root, features={"action": FEATURES["action"]}), "has no videos"),
        (
            lambda root: edit(root, features={**FEATURES, "side": FEATURES[CAMERA]}),
            "2 cameras; choose one: data.camera=",
        ),
        (lambda root: edit(root, video_path="../{video_key}.mp4"), "leads outside"),
        (lambda root: edit(root, video_path="{video_key.__class__}/../../../x"), "outside"),
        (lambda root: edit(root, fps=None), "cannot be read"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused_in_one_line(root, change, message):
    change(root)
    with pytest.raises(ValueError, match=message) as error:
        dataset(root)
    assert "\n" not in str(error.value)


def test_another_rate_or_camera_is_refused(root):
    with pytest.raises(ValueError, match=r"data\.fps=8 takes other frames"):
        dataset(root, fps=8.0)
    with pytest.raises(ValueError, match=r"data\.camera='back' is none"):
        dataset(root, camera="back")


def edit(root, **changes):
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

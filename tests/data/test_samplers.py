import copy
import hashlib
import itertools
import json

import numpy as np
import pytest

from stdit import legacy
from stdit.config import Config, load_typed
from stdit.data import samplers
from stdit.data.samplers import (
    NO_BUCKET,
    BlockedSampler,
    BucketSampler,
    ClipSize,
    PackedSampler,
    SampleRef,
    UniformSampler,
    assign_buckets,
)
from stdit.recipes.order import build_order
from stdit.rng import keyed_choices, keyed_rng
from stdit.vae import VAEGeometry

SIZES = [ClipSize(1, 32, 32), ClipSize(5, 32, 32), ClipSize(9, 32, 32), ClipSize(5, 32, 48)]
COSTS = [4, 8, 12, 12]
SHAPES = [(1, 50, 50), (30, 60, 60), (30, 40, 60), (7, 33, 33), (30, 64, 64), (3, 20, 30)] * 7


def all_samplers():
    buckets = assign_buckets(SHAPES, SIZES, 3)
    return [
        UniformSampler(3, len(SHAPES), 4),
        BlockedSampler(3, [7, 10, 4, 21], 2, 4),
        *(
            sampler(3, buckets, SIZES, COSTS, tokens=40, processes=processes)
            for sampler in (BucketSampler, PackedSampler)
            for processes in (1, 2)
        ),
    ]


def ids(value):
    return type(value).__name__


def test_a_clip_is_assigned_to_the_nearest_aspect_and_a_length_that_fits():
    buckets = assign_buckets(SHAPES, SIZES, 3)
    for (frames, height, width), number in zip(SHAPES, buckets, strict=True):
        size = SIZES[number]
        assert size.frames <= frames
        if frames >= 5:
            assert (size.width > size.height) == (width > height)
    assert {buckets[1 + 6 * i] for i in range(7)} > {buckets[0]} or len({buckets[1 + 6 * i] for i in range(7)}) > 1
    assert buckets.tolist() == assign_buckets(SHAPES, SIZES, 3).tolist() != assign_buckets(SHAPES, SIZES, 4).tolist()
    assert assign_buckets([(3, 10, 10)], [ClipSize(5, 32, 32)], 0).tolist() == [NO_BUCKET]


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**62 - 3])
@pytest.mark.parametrize("count", [2, 3, 5, 2**31 + 1])  # the last is drawn again for half of the keys
def test_choices_for_many_keys_at_once_are_those_of_each_key(seed, count):
    rows = np.array([0, 1, 65535, 65536, 2**32 - 1, *np.random.default_rng(1).integers(0, 2**32, 40)])
    one_by_one = [keyed_rng("order", seed, int(row), 1).integers(count) for row in rows]
    assert keyed_choices("order", (seed, rows, 1), count).tolist() == one_by_one
    long = keyed_choices("order", (seed, np.arange(65600), 1), count)  # in several blocks
    assert long[65590] == keyed_rng("order", seed, 65590, 1).integers(count)
    if count < 9:
        choice = [keyed_rng("order", seed, int(row), 1).choice(list(range(count))) for row in rows]
        assert choice == one_by_one


def test_a_size_of_one_frame_takes_images_and_clips_that_are_too_short_for_others():
    sizes = [ClipSize(17, 64, 64), ClipSize(5, 64, 64), ClipSize(1, 64, 64)]
    shapes = [(40, 64, 64)] * 20 + [(7, 64, 64), (3, 64, 64), (1, 64, 64)]
    buckets = assign_buckets(shapes, sizes, 0)
    assert set(buckets[:20]) == {0, 1} and buckets[20:].tolist() == [1, 2, 2]


def test_a_batch_has_no_more_clips_than_its_bucket_but_for_a_clip_on_every_process():
    for processes, expected in ((1, {3, 4}), (2, {4})):
        sampler = BucketSampler(
            0, [0] * 8 + [1] * 3, [ClipSize(5, 8, 8), ClipSize(1, 8, 8)], [10, 1], tokens=40, processes=processes
        )
        assert {len(sampler.batch(step)) for step in range(12)} == expected


@pytest.mark.parametrize("sampler", all_samplers(), ids=ids)
def test_a_batch_depends_on_seed_and_step_alone(sampler):
    twin = copy.deepcopy(sampler)  # by the state that a loader process gets
    steps = [sampler.batch(step) for step in range(30)]
    assert [twin.batch(step) for step in reversed(range(30))] == steps[::-1]
    assert all(isinstance(ref, SampleRef) for batch in steps for ref in batch)
    assert len({tuple(ref.sample for ref in batch) for batch in steps}) > 5


@pytest.mark.parametrize("sampler", all_samplers(), ids=ids)
def test_every_sample_of_a_batch_is_a_candidate_for_its_size(sampler):
    assert all(ref.sample in sampler.candidates(ref.size) for step in range(5) for ref in sampler.batch(step))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bucket_batch_has_one_size_within_the_budget_and_an_epoch_covers_every_clip(processes):
    buckets = assign_buckets(SHAPES, SIZES, 3)
    sampler = BucketSampler(3, buckets, SIZES, COSTS, tokens=40, processes=processes)
    covered = set()
    for step in range(int(sampler.begins[-1])):
        batch = sampler.batch(step)
        sizes = {ref.size for ref in batch}
        assert len(sizes) == 1
        assert len(batch) % processes == 0
        cost = COSTS[SIZES.index(sizes.pop())]
        assert len(batch) * cost <= max(40, cost * processes)
        covered |= {ref.sample for ref in batch}
    assert covered == set(range(len(SHAPES)))


@pytest.mark.parametrize(("tokens", "same"), [(48, True), (40, False)])
def test_buckets_of_two_processes_are_those_of_one_if_the_clips_of_every_size_in_a_step_are_even(tokens, same):
    sizes, costs = SIZES[1:3], [8, 12]  # 48 tokens are six clips or four, 40 are five or three
    one, two = (BucketSampler(3, [0] * 21 + [1] * 9, sizes, costs, tokens=tokens, processes=n) for n in (1, 2))
    assert ([one.batch(step) for step in range(20)] == [two.batch(step) for step in range(20)]) == same


def test_a_pack_fills_its_budget_and_an_epoch_covers_every_clip_once():
    buckets = assign_buckets(SHAPES, SIZES, 3)
    sampler = PackedSampler(3, buckets, SIZES, COSTS, tokens=40)
    taken, step = [], 0
    while len(taken) < len(SHAPES):
        batch = sampler.batch(step)
        used = sum(COSTS[SIZES.index(ref.size)] for ref in batch)
        assert used <= 40
        assert used > 40 - max(COSTS) or len(taken) + len(batch) == len(SHAPES)
        taken += [ref.sample for ref in batch]
        step += 1
    assert sorted(taken) == list(range(len(SHAPES)))


def test_budgets_and_sizes_that_cannot_hold_a_clip_are_refused():
    with pytest.raises(ValueError, match=r"a clip of 12 tokens does not fit into a pack of 10 .* use train.tokens=12"):
        PackedSampler(0, [0, 2], SIZES, COSTS, tokens=10)
    with pytest.raises(ValueError, match="add a size with fewer frames"):
        BucketSampler(0, [NO_BUCKET], SIZES, COSTS, tokens=10)


def test_names_of_version_0_1_are_read_with_a_warning(monkeypatch):
    monkeypatch.setattr(legacy, "_warned", set())
    for old, new in legacy.NAMES["stdit.data.samplers"].items():
        with pytest.warns(UserWarning, match=f"is now called 'stdit.data.samplers.{new}'"):
            assert getattr(samplers, old) is getattr(samplers, new)


def test_a_blocked_order_reads_few_shards_at_a_time_and_every_clip_once_an_epoch():
    counts, window = [10] * 12, 3
    sampler = BlockedSampler(1, counts, window, batch_size=5)
    epochs = [[ref.sample for step in range(24 * e, 24 * (e + 1)) for ref in sampler.batch(step)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(120))
        for first in range(0, 120, 30):
            assert len({sample // 10 for sample in epoch[first : first + 30]}) == window
    assert epochs[0] != epochs[1] != epochs[2]
    inside = [sample // 10 for sample in epochs[0][:30]]
    assert sum(a != b for a, b in itertools.pairwise(inside)) > 10  # shuffled, not shard after shard


class Shards:
    """As much of a dataset as orders are built from: 42 clips in shards, of one data set or of two."""

    shards, rates = [7, 10, 4, 21], [24.0]

    def __init__(self, parts):
        self.parts = parts

    def __len__(self):
        return len(SHAPES)

    def shapes(self):
        return np.array(SHAPES)


TWO_SETS = "data.datasets=[{root: a, weight: 3}, {root: b, weight: 1}]"
BUCKETS = ["data.sizes=[[1,32,32],[5,32,32],[9,32,32],[5,32,48]]", "train.tokens=40", "train.micro_batch=null"]
# The settings of an order, its processes, and a hash of its first 20 batches: after a change, runs would resume with other clips.
RECORDED = {
    "uniform": ([], 1, "f9e985b23b51"),
    "blocked": (["data.order=blocked", "data.order_window=2"], 1, "20c4f46ea0f8"),
    "buckets": (BUCKETS, 1, "7eadf15198ab"),
    "buckets of two processes": (BUCKETS, 2, "9ee5b043d167"),
    "packs": ([*BUCKETS, "data.packing=true"], 1, "5eba189a0324"),
    "packs of two processes": ([*BUCKETS, "data.packing=true"], 2, "cf0778f30f6f"),
    "two sets": ([TWO_SETS], 1, "fb2f308dba1a"),
    "two sets, blocked": ([TWO_SETS, "data.order=blocked", "data.order_window=1"], 1, "bec751f2c5cc"),
    "buckets of two sets": ([TWO_SETS, *BUCKETS], 1, "a8657d60965a"),
    "packs of two sets": ([TWO_SETS, *BUCKETS, "data.packing=true"], 1, "b177aabbee4f"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_the_first_batches_of_every_order_are_the_recorded_ones(name, tmp_path):
    settings, processes, recorded = RECORDED[name]
    (tmp_path / "t.yaml").write_text("{seed: 3, data: {source: videos}, train: {batch_size: 4}}")
    config = load_typed(Config, str(tmp_path / "t.yaml"), settings)
    dataset = Shards([17, 25] if config.data.datasets else [len(SHAPES)])
    vae = VAEGeometry("tiny", (4, 8, 8), 4)
    order = build_order(config, dataset, vae, patch=(1, 2, 2), processes=processes)
    batches = [[(ref.sample, ref.size) for ref in order.batch(step)] for step in range(20)]
    assert hashlib.sha256(json.dumps(batches).encode()).hexdigest()[:12] == recorded

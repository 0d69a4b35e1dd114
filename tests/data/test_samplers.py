import pytest

from stdit.data.samplers import BucketSampler, PackedSampler, SampleRef, Size, UniformSampler, assign

SIZES = [Size(1, 32, 32), Size(5, 32, 32), Size(9, 32, 32), Size(5, 32, 48)]
COSTS = [4, 8, 12, 12]
SHAPES = [(1, 50, 50), (30, 60, 60), (30, 40, 60), (7, 33, 33), (30, 64, 64), (3, 20, 30)] * 7


def kinds():
    chosen = assign(SHAPES, SIZES, 3)
    return [
        UniformSampler(3, len(SHAPES), 4),
        *(
            kind(3, chosen, SIZES, COSTS, 40, processes)
            for kind in (BucketSampler, PackedSampler)
            for processes in (1, 2)
        ),
    ]


def ids(value):
    return type(value).__name__


def test_a_clip_goes_to_the_nearest_aspect_and_a_length_that_it_has():
    chosen = assign(SHAPES, SIZES, 3)
    for (frames, height, width), number in zip(SHAPES, chosen, strict=True):
        size = SIZES[number]
        assert size.frames <= frames
        if frames >= 5:
            assert (size.width > size.height) == (width > height)
    assert {chosen[1 + 6 * i] for i in range(7)} > {chosen[0]} or len({chosen[1 + 6 * i] for i in range(7)}) > 1
    assert chosen == assign(SHAPES, SIZES, 3) != assign(SHAPES, SIZES, 4)
    assert assign([(3, 10, 10)], [Size(5, 32, 32)], 0) == [None]


@pytest.mark.parametrize("order", kinds(), ids=ids)
def test_a_step_is_a_function_of_seed_and_number_alone(order):
    again = next(other for other in kinds() if type(other) is type(order) and vars(other) == vars(order))
    steps = [order.batch(step) for step in range(30)]
    assert [again.batch(step) for step in reversed(range(30))] == steps[::-1]
    assert all(isinstance(slot, SampleRef) for batch in steps for slot in batch)
    assert len({tuple(slot.sample for slot in batch) for batch in steps}) > 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bucket_batch_is_of_one_size_within_the_budget_and_an_epoch_takes_every_clip(processes):
    chosen = assign(SHAPES, SIZES, 3)
    order = BucketSampler(3, chosen, SIZES, COSTS, 40, processes)
    seen = set()
    for step in range(len(order.plan)):
        batch = order.batch(step)
        sizes = {slot.size for slot in batch}
        assert len(sizes) == 1
        assert len(batch) % processes == 0
        cost = COSTS[SIZES.index(sizes.pop())]
        assert len(batch) * cost <= max(40, cost * processes)
        seen |= {slot.sample for slot in batch}
    assert seen == set(range(len(SHAPES)))


def test_a_pack_fills_its_budget_without_going_over_and_an_epoch_takes_every_clip_once():
    chosen = assign(SHAPES, SIZES, 3)
    order = PackedSampler(3, chosen, SIZES, COSTS, 40)
    seen, step = [], 0
    while len(seen) < len(SHAPES):
        batch = order.batch(step)
        used = sum(COSTS[SIZES.index(slot.size)] for slot in batch)
        assert used <= 40
        assert used > 40 - max(COSTS) or len(seen) + len(batch) == len(SHAPES)
        seen += [slot.sample for slot in batch]
        step += 1
    assert sorted(seen) == list(range(len(SHAPES)))


def test_budgets_and_sizes_that_cannot_hold_a_clip_are_refused():
    with pytest.raises(ValueError, match=r"a clip of 12 tokens does not fit into a pack of 10 .* use train.tokens=12"):
        PackedSampler(0, [0, 2], SIZES, COSTS, 10)
    with pytest.raises(ValueError, match="add a shorter one"):
        BucketSampler(0, [None], SIZES, COSTS, 10)

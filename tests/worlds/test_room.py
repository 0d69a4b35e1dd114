"""The world that ships: a room with walls, a player and a ball."""

import numpy as np
import pytest

from stdit.evaluation.room import expected_move, measure_player, state
from stdit.worlds.room import ACTIONS, BALL, HALF, SIDE, SPEED, Room


def test_a_room_is_a_function_of_its_seed_and_of_the_actions():
    runs = []
    for _ in range(2):
        room = Room()
        frames = [room.reset(seed=5)[0], *(room.step(action)[0] for action in [1, 4, 4, 2, 0, 3] * 5)]
        runs.append(np.stack(frames))
    assert np.array_equal(*runs)
    assert not np.array_equal(runs[0][0], Room().reset(seed=6)[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_player_moves_as_told_or_touches_a_wall_and_nothing_ever_is_inside_one(seed):
    room, rng = Room(), np.random.default_rng(seed)
    room.reset(seed=seed)
    for _ in range(300):
        before, action = room.position, int(rng.integers(len(ACTIONS)))
        _, reward, ended, cut, info = room.step(action)
        assert (reward, ended, cut) == (0.0, False, False)
        told = SPEED * np.array(list(ACTIONS.values())[action])
        assert np.array_equal(room.position - before, np.zeros(2) if info["blocked"] else told)
        assert not room.walls.hit(room.position, HALF) and not room.walls.hit(room.ball, BALL)
        if info["blocked"]:
            assert room.walls.hit(room.position + told, HALF)


def test_pictures_are_scaled_and_show_the_player_where_it_stands():
    for size in (32, 64, 128):
        for seed in range(6):
            room = Room(size=size)
            frame, info = room.reset(seed=seed)
            assert frame.shape == (size, size, 3) and frame.dtype == np.uint8
            seen = measure_player(frame, state(room))
            assert seen.shape == room.shape or size == 32
            assert np.allclose(seen.center, room.position, atol=1.0)
            assert np.allclose(np.array(info["position"]) * SIDE / size, room.position)
            assert np.array_equal(Room.like(room.truth).walls.boxes, room.walls.boxes)


def test_the_judge_expects_what_the_room_does():
    room = Room()
    room.reset(seed=3)
    for action in (4, 4, 1, 3, 2) * 6:
        before = room.position
        move = expected_move(state(room), before, action, 4)
        for _ in range(4):
            room.step(action)
        assert np.array_equal(room.position - before, move)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Room(render_mode="human"), "render_mode='human'"),
        (lambda: Room(size=30), "size=30"),
        (lambda: Room().step(9), "action 9 is out of range"),
    ],
)
def test_a_wrong_use_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""After how many groups a key changes the picture on the page of the room, in the worst case.

stdit play models/room --no-browser --port 8123
python dev/measure_keys.py models/room 8123

A key is pressed just after the next group was asked for, as on the page; only presses that the environment would obey count.
"""

import io
import json
import struct
import sys
from collections import Counter

import numpy as np
from PIL import Image
from websockets.sync.client import connect

from stdit.evaluation.room import expected_move, measure_player, state
from stdit.recipes.play import FIRST_SEED
from stdit.sampling.pipeline import STDiTPipeline
from stdit.worlds.environments import environment_of

TRIALS, STILL, WAITED = 40, 3, 6  # presses, groups before each, groups that are waited for


def receive_group(play) -> np.ndarray:
    """The last picture (H, W, 3) of the next group, without the truth beside it."""
    while isinstance(message := play.recv(timeout=30), str):
        if json.loads(message)["type"] == "error":
            raise ValueError(message)
    _, count, both = struct.unpack("<IHH", message[:8])
    at, pictures = 8, []
    while at < len(message):
        (size,) = struct.unpack("<I", message[at : at + 4])
        pictures.append(np.array(Image.open(io.BytesIO(message[at + 4 : at + 4 + size])).convert("RGB")))
        at += 4 + size
    assert len(pictures) == count * (1 + both)
    return pictures[count - 1]


def main(model: str, port: str) -> None:
    """Press keys and print the counts."""
    pipe = STDiTPipeline.from_pretrained(model)
    space = pipe.transformer.conditioners["actions"].space
    env, found = environment_of(space.environment), Counter()
    headers = {"Origin": f"http://127.0.0.1:{port}"}
    with connect(f"ws://127.0.0.1:{port}/play", additional_headers=headers, max_size=None) as play:
        receive_group(play)
        for trial in range(TRIALS):
            seed, action = 100 + trial, 1 + trial % 4
            env.reset(FIRST_SEED + seed)
            truth = state(env.env.unwrapped)
            play.send(json.dumps({"type": "restart", "seed": seed}))
            receive_group(play)
            for _ in range(STILL):
                play.send(json.dumps({"type": "act", "action": 0}))
                play.send(json.dumps({"type": "shown"}))
                before = receive_group(play)
            start = measure_player(before, truth).center
            wanted = expected_move(truth, start, action, 4)
            if not np.isfinite(start).all() or np.abs(wanted).max() < 8:
                continue
            play.send(json.dumps({"type": "shown"}))  # this group is made before the key is known
            play.send(json.dumps({"type": "act", "action": action}))
            groups = 0
            for number in range(1, WAITED + 1):
                moved = measure_player(receive_group(play), truth).center - start
                if (moved * np.sign(wanted)).sum() > 4:
                    groups = number
                    break
                play.send(json.dumps({"type": "shown"}))
            found[groups] += 1
    print({f"after {n} groups" if n else "never": count for n, count in sorted(found.items())})


if __name__ == "__main__":
    main(*sys.argv[1:])

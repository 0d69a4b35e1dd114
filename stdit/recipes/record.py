"""Record episodes of an environment as clips, with a manifest of the actions that led to every frame.

stdit record room --episodes 3000 --frames 25 --repeat 4 --policy sticky --output data/room
stdit record MiniGrid-Empty-8x8-v0 --episodes 2000 --frames 33 --repeat 4 --size 64 --output data/minigrid

The same command goes on where it was stopped. Environments besides "room" need: pip install 'stdit[worlds]'
"""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stdit.files import write_text
from stdit.progress import Progress
from stdit.recipes.entry import check_least, command, command_parser
from stdit.worlds.environments import Environment, make_environment
from stdit.worlds.policies import make_policy
from stdit.worlds.record import Recording, play_episode, write_episode

PART = 16  # episodes that a process records at a time


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Record the episodes that are not there yet, and write the manifest."""
    args = _parser().parse_args(argv)
    check_least(args, "episodes", "frames", "repeat")
    check_least(args, "seed", least=0)
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise ValueError(f"--fps must be a number above 0, got {args.fps}.")
    env = make_environment(args.environment, dict(args.option), args.turn_based)
    make_policy(args.policy, env.space)  # raises if there is none
    versions, turn_based, size = env.versions, env.turn_based, args.size or _own_size(env)
    how = Recording(
        args.frames,
        args.repeat,
        size,
        fps=args.fps or env.fps,
        info=tuple(args.info),
        lossless=args.lossless,
        label=args.label,
    )
    play_episode(env, make_policy(args.policy, env.space)(), how._replace(frames=2), seed=args.seed)  # raises early
    env.env.close()
    output = Path(args.output)
    settings = {
        "environment": args.environment, "options": dict(args.option), "policy": args.policy, "seed": args.seed,
        "versions": dict(versions), "turn_based": turn_based, **how._asdict(),
    }  # fmt: skip
    rows = _begin(output, json.loads(json.dumps(settings)))
    missing = [seed for seed in range(args.seed, args.seed + args.episodes) if seed not in rows]
    parts = [missing[i : i + PART] for i in range(0, len(missing), PART)]
    job = (args.environment, dict(args.option), turn_based, args.policy, how, str(output))
    with open(output / "rows.jsonl", "a", encoding="utf-8") as kept, _workers(args.workers, len(parts)) as run:
        for found in Progress(run(job, parts), total=len(parts), unit="part", desc=f"recording ({PART} episodes each)"):
            rows |= {row["seed"]: row for row in found}
            kept.write("".join(json.dumps(row) + "\n" for row in found))
            kept.flush()
    wanted = [rows[seed] for seed in sorted(rows)]  # with those of earlier calls
    write_text(output / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in wanted))
    total = sum(row["frames"] for row in wanted)
    short = sum(row["frames"] < args.frames for row in wanted)
    ended = f"; {short} ended before {args.frames} frames" if short else ""
    print(f"{len(wanted)} episodes, {total} frames of {size[0]} x {size[1]}{ended}: {output / 'manifest.jsonl'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("record", __doc__)
    parser.add_argument("environment", metavar="ENV", help='"room", which ships, or an id of Gymnasium\'s')
    parser.add_argument("--episodes", type=int, default=1000, help="number of episodes")
    parser.add_argument("--frames", type=int, default=33, help="of an episode at most")
    parser.add_argument("--policy", default="sticky", help="random, sticky, or MODULE:FUNCTION(observation, info, rng)")
    parser.add_argument("--repeat", type=int, default=4, help="frames that one action lasts")
    parser.add_argument(
        "--turn-based",
        action=argparse.BooleanOptionalAction,
        help="an action is one step of the environment, whose picture lasts --repeat frames; default: for MiniGrid. Otherwise "
        "every frame is a step",
    )
    parser.add_argument("--size", type=_size, help="side of the pictures, or HEIGHTxWIDTH; default: as they are drawn")
    parser.add_argument("--fps", type=float, help="frames a second of the clips; default: the environment's")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode; the others follow")
    parser.add_argument("--info", nargs="+", default=[], metavar="NAME", help="what of the environment's info is kept")
    parser.add_argument(
        "--label", metavar="NAME", help="what of it, at the start of an episode, is the label of its clip"
    )
    parser.add_argument(
        "--option", type=_option, action="append", default=[], metavar="KEY=VALUE", help="of the environment"
    )
    parser.add_argument(
        "--lossless", action="store_true", help="clips with exactly the frames, which browsers do not show"
    )
    parser.add_argument("--workers", type=int, help="processes; default: one for each core")
    parser.add_argument("--output", required=True, help="folder for the clips and manifest.jsonl")
    return parser


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 64, or 64x80 (height x width)")
    return int(parts[0]), int(parts[-1])


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _own_size(env: Environment) -> tuple[int, int]:
    env.reset(0)
    height, width = env.picture().shape[:2]
    return height, width


def _begin(output: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Make the folder -> the rows of episodes that are there already, by seed; ValueError if it has others."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    if found is None:
        if any(output.iterdir()):
            raise ValueError(f"{output} is not empty and holds no recording; choose another --output.")
        write_text(path, json.dumps(settings) + "\n")
        return {}
    changed = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key) and key != "seed")
    if changed:
        raise ValueError(
            f"{output} has episodes of other settings ({', '.join(changed)}); choose another --output, or remove it."
        )
    rows: dict[int, dict[str, Any]] = {}
    kept = output / "rows.jsonl"
    for line in kept.read_text().splitlines() if kept.is_file() else ():
        with contextlib.suppress(ValueError):  # the last line of a run that was killed
            row = json.loads(line)
            if (output / row["path"]).is_file():
                rows[row["seed"]] = row
    return rows


@contextlib.contextmanager
def _workers(count: int | None, parts: int) -> Iterator[Any]:
    """A function that records parts, in this process or in several, and yields the rows of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores if count is None else count, parts)
    if count <= 1:
        yield lambda job, parts: (record_part(job, part) for part in parts)
        return
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        yield lambda job, parts: pool.map(record_part, [job] * len(parts), parts)


def record_part(
    job: tuple[str, dict[str, Any], bool, str, Recording, str], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Record the episodes of some seeds -> their rows of the manifest."""
    name, options, turn_based, policy, how, output = job
    env = make_environment(name, options, turn_based)
    make = make_policy(policy, env.space)
    rows = []
    for seed in seeds:
        episode = play_episode(env, make(), how, seed=seed)
        rows.append(write_episode(Path(output) / f"{seed:06d}.mp4", episode, env, how, seed=seed, options=options))
    env.env.close()
    return rows

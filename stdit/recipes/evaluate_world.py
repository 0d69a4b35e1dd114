"""Measure whether a world obeys: its dream beside the truth of its environment, under the same actions.

stdit evaluate --world --model models/room
stdit evaluate --world --model models/doom --actions 64 --episodes 96

Writes report.json, report.png (curves, and dreams above their truth) and dream-N.mp4 into output/NAME/world.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stdit.data.video_write import write_video
from stdit.evaluation import minigrid, motion, room
from stdit.evaluation.features import load_extractor
from stdit.evaluation.frechet import Gaussian, frechet_distance
from stdit.evaluation.worlds import (
    HORIZONS,
    DreamedEpisode,
    Episode,
    Play,
    dream,
    fidelity_by_horizon,
    loss_under_other_actions,
    play_episode,
    teacher_forced,
)  # fmt: skip
from stdit.files import finite, write_json
from stdit.pixels import to_float
from stdit.recipes.entry import command, command_parser
from stdit.recipes.info import newest_model
from stdit.recipes.models import load_pipeline
from stdit.sampling.checks import check_world
from stdit.sampling.options import WORLD_OPTIONS, add_flags, options_from
from stdit.worlds.environments import SHIPPED, environment_of, frames_of_action, steps_of_group
from stdit.worlds.policies import make_policy

FIRST_SEED = 2_000_000  # beyond the seeds that are recorded or played
_SHOWN = 6  # episodes in the picture
_RIGHT = 0.98  # share of the truth that a measurement must find right


class Measure(NamedTuple):
    """How a kind of environment is measured: what is read from it, the measurements of rollouts, and the one that must be
    right on the truth itself."""

    state: Callable[[Any], Any]
    run: Callable[[Sequence[DreamedEpisode], int], dict[str, Any]]
    share: str = ""


# By the beginning of an environment's name; others by the motion of whole pictures.
MEASURES = {
    SHIPPED: Measure(room.state, room.measure_rollouts, "moves as its action says"),
    "MiniGrid-": Measure(minigrid.state, minigrid.measure_rollouts, "cell and heading right after so many actions"),
    "": Measure(motion.state, motion.measure_rollouts),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Play, dream, measure, and write the report."""
    parser = command_parser("evaluate-world", __doc__)
    parser.add_argument("--model", help="default: the newest under models/")
    parser.add_argument("--episodes", type=int, default=48, help="of seeds that were never recorded")
    parser.add_argument("--actions", type=int, default=128, help="of an episode")
    parser.add_argument("--policy", default="sticky", help="random, sticky, or MODULE:FUNCTION")
    add_flags(parser, WORLD_OPTIONS, num_inference_steps=6)
    args = parser.parse_args(argv)
    for name in ("episodes", "actions"):
        if getattr(args, name) < (2 if name == "episodes" else 1):
            raise ValueError(f"--{name} {getattr(args, name)} is too few; use 48 episodes of 128 actions.")
    model = Path(args.model) if args.model else newest_model()
    pipe = load_pipeline(model)
    options = options_from(args, progress=False)
    space = check_world(pipe.engine, options).space
    if space.environment is None:
        raise ValueError(
            f"{model} does not know its environment, so there is no truth; train it on what stdit record writes."
        )
    env = environment_of(space.environment)
    name = str(space.environment["name"])
    measure = next(found for prefix, found in MEASURES.items() if name.startswith(prefix))
    size = (pipe.config.height, pipe.config.width)
    stride = pipe.video_vae.stride[0]
    label = space.environment.get("label") if pipe.transformer.num_classes else None
    how = Play(
        env,
        make_policy(args.policy, env.space),
        args.actions,
        group=stride,
        size=size,
        state=measure.state,
        label=label,
        repeat=frames_of_action(space, stride),
    )
    if env.turn_based and (steps := steps_of_group(space, stride)) > 1:
        print(
            f"an action is held for {stride} frames, which are {steps} steps of this environment; for one step each, record with "
            f"--repeat {stride}"
        )
    episodes = [play_episode(how, FIRST_SEED + i) for i in range(args.episodes)]
    env.env.close()
    whole = [one for one in episodes if one.actions]
    if len(whole) < len(episodes):
        print(f"{len(episodes) - len(whole)} episodes end within their first group, and are left out")
    if len(whole) < 2:
        raise ValueError(f"{len(whole)} episodes of {name!r} last a group of {stride} frames; choose another --policy.")
    episodes = whole
    if measure.share and not right_on_truth(measure, episodes, stride):
        print(
            f"the measurement of {name!r} is not right on its own pictures at this size; the motion of whole pictures is measured"
        )
        measure = MEASURES[""]
    dreams = list(dream(pipe, episodes, options))
    forced, shuffled = teacher_forced(pipe, episodes, options), loss_under_other_actions(pipe, episodes)
    curves = fidelity_by_horizon(dreams)
    report = {
        **measure.run(dreams, stride),
        "loss under the actions of other clips, times as large": shuffled.ratio,
        "of the difference, standard errors": (shuffled.shuffled - shuffled.true) / max(shuffled.error, 1e-12),
        "PSNR predicted from true frames, dB": forced.predicted,
        "PSNR of the VAE's round trip, dB": forced.decoded,
        "PSNR after so many actions, dB": {n: one.psnr for n, one in curves.items()},
        "SSIM after so many actions": {n: one.ssim for n, one in curves.items()},
        "drift of mean colours after so many actions": {n: one.drift for n, one in curves.items()},
        "Fréchet distance to the truth after so many actions": frechet_by_horizon(dreams),
    }
    for title, value in report.items():
        rounded = {n: round(v, 3) for n, v in value.items()} if isinstance(value, dict) else value
        print(f"{title:<55} {f'{rounded:.4g}' if isinstance(rounded, float) else rounded}")
    folder = Path("output") / model.name / "world"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", {**vars(args), "environment": dict(space.environment), **finite(report)})
    draw_report(folder / "report.png", dreams, report, title=f"{model.name}: {args.episodes} episodes of {name}")
    for i, one in enumerate(dreams[:4]):
        both = np.concatenate([one.lasts, one.truth.lasts], axis=2)
        write_video(folder / f"dream-{i}.mp4", both, fps=max(1.0, pipe.config.fps / stride))
    print(f"{folder / 'report.png'}, report.json and dream-0.mp4 (dream left, truth right) next to it")
    return 0


def right_on_truth(measure: Measure, episodes: Sequence[Episode], stride: int) -> bool:
    """Whether a measurement finds the truth itself right."""
    found = measure.run([DreamedEpisode(one.lasts, one) for one in episodes], stride)[measure.share]
    return min(found.values() if isinstance(found, dict) else [found]) >= _RIGHT


def frechet_by_horizon(dreams: Sequence[DreamedEpisode]) -> dict[int, float]:
    """The distance between dreamed and true pictures after each horizon, in features of the tiny VAE."""
    extractor, found = load_extractor("vae"), {}
    for horizon in HORIZONS:
        whole = [one for one in dreams if len(one.lasts) > horizon]
        if len(whole) > 1:
            made, real = (
                Gaussian().add(extractor.run(to_float(np.stack(frames)[:, None]).clone()))
                for frames in ([one.lasts[horizon] for one in whole], [one.truth.lasts[horizon] for one in whole])
            )
            found[horizon] = frechet_distance(made, real)
    return found


def draw_report(path: Path, dreams: Sequence[DreamedEpisode], report: dict[str, Any], *, title: str) -> None:
    """Curves over the horizon, and below them strips of dreams above their truth."""
    from matplotlib.figure import Figure

    curves = {name: value for name, value in report.items() if isinstance(value, dict)}
    longest = max(len(one.lasts) for one in dreams)
    horizons = [n for n in (0, *HORIZONS) if n < longest]
    strips = np.concatenate([_strip(one, horizons) for one in dreams[:_SHOWN]])
    columns = 3
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(11, 2.4 * rows + 11 * len(strips) / strips.shape[1]), layout="constrained")
    heights = [2.4 * rows, 11 * len(strips) / strips.shape[1]]
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)  # type: ignore[misc]
    axes = upper.subplots(rows, columns, squeeze=False).flat
    for (name, values), axis in zip(curves.items(), axes, strict=False):  # in this order no axis is lost
        axis.plot(list(values), [np.nan if np.isinf(v) else v for v in values.values()], "o-", markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_title(name, fontsize=8, wrap=True)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes:
        axis.set_axis_off()
    picture = lower.subplots()
    picture.imshow(strips)
    picture.set_axis_off()
    picture.set_title(f"dream above truth after {', '.join(map(str, horizons))} actions", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)


def _strip(one: DreamedEpisode, horizons: Sequence[int]) -> np.ndarray:
    """Frames of a dream above those of its truth; white where the episode is over."""
    blank = np.full_like(one.lasts[0], 255)
    rows = [
        np.concatenate([frames[n] if n < len(frames) else blank for n in horizons], axis=1)
        for frames in (one.lasts, one.truth.lasts)
    ]
    line = np.full((3, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([*rows, line])

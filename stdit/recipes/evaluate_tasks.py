"""Measure the tasks extend, connect, loop, interpolate, inpaint, edit and animate on moving shapes, against the truth.

stdit evaluate-tasks --model models/quickstart --bounce models/bounce --rollout models/rollout --clips 96
stdit evaluate-tasks --model models/quickstart_few --steps 8 --against output/quickstart/tasks.json

`--model` was trained on shapes that move straight (configs/quickstart.yaml; or configs/extend.yaml, without labels),
`--bounce` on shapes that bounce (configs/bounce.yaml); `--rollout` is causal (configs/rollout.yaml). The results are
written to output/NAME/tasks.json, also those of each clip, and a contact sheet of each task to output/NAME/tasks/: the
truth left, the generated clip right, with an orange line at generated frames.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES
from stdit.data.video_write import write_contact_sheet
from stdit.evaluation import operations as op
from stdit.evaluation.rollouts import rollout
from stdit.files import finite, write_json
from stdit.recipes.against import AGAINST, print_differences, read_saved
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.models import load_pipeline
from stdit.sampling.pipeline import STDiTPipeline


def load(path: str) -> STDiTPipeline:
    """Load a pipeline. ValueError unless it was trained on moving shapes, which the measurements need."""
    pipe = load_pipeline(path)
    names = pipe.transformer.config.class_names
    known = sorted(names or []) == sorted(CLASS_NAMES) or (names and set(names) <= set(OBJECT_NAMES))
    if pipe.transformer.num_classes and not known:
        raise ValueError(
            f"{path} was not trained on moving shapes, and only those can be measured here; give a model of configs/quickstart.yaml."
        )
    return pipe


def straight(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """Task name -> its measurement, for a model of shapes that move straight."""
    data = op.held_out(count, pipe.config.num_frames, "straight", pipe.config.height, seed=seed)
    if not pipe.transformer.num_classes:  # the known frames alone determine the motion
        return {
            "extend-forward": lambda: op.extension(pipe, data, 5, backward=False, max_error=2.0, **options),
            "extend-backward": lambda: op.extension(pipe, data, 8, backward=True, max_error=2.0, **options),
        }

    def at(scale: float, guider: str | None = "cfg") -> dict:
        """Options of a task that must follow its label: guidance leads away from no label, where the model can."""
        learnt = pipe.engine.learnt_guidance
        if learnt is not None:
            guider = guider if guider in learnt.scales else pipe.engine.default_guider
            return {**options, "guidance_scale": min(scale, learnt.scales[guider]), "guider": guider}
        return {**options, "guidance_scale": scale if pipe.engine.distilled_guidance == 1 else 1.0, "guider": guider}

    # In few steps, shapes are lost away from the guide, and motion at larger scales.
    labelled = at(2.0, guider=None if pipe.engine.learnt_guidance is None else "cfg")
    return {
        "extend-forward": lambda: op.extension(pipe, data, 5, backward=False, max_error=2.0, **labelled),
        "extend-backward": lambda: op.extension(pipe, data, 8, backward=True, max_error=2.0, **labelled),
        "interpolate": lambda: op.interpolation(pipe, data, 2, **labelled),
        "inpaint": lambda: op.inpainting(pipe, data, **labelled),
        "edit-0.3": lambda: op.editing(pipe, data, 0.3, min_share=0.9, new_label=False, **at(1.0)),
        "edit-0.8": lambda: op.editing(pipe, data, 0.8, min_share=0.8, new_label=True, **at(5.0)),
        "animate": lambda: op.animation(pipe, data, **at(3.0)),
        "known": lambda: op.known_frames(pipe, data, **labelled),
        "sizes": lambda: op.sizes(pipe, count, **at(3.0)),
    }


def bouncing(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """Task name -> its measurement, for a model of shapes that bounce."""
    length, size = pipe.config.num_frames, pipe.config.height
    led, options = {**options, "history_guidance": 2.0}, {**options, "history_guidance": 1.5}
    short, pictures, beyond = (op.held_out(count, n, "bounce", size, seed=seed + 1) for n in (length, 18, length + 16))
    return {
        "extend-bounce": lambda: op.extension(pipe, short, 5, backward=False, max_error=2.0, **options),
        "extend-beyond": lambda: op.extension(pipe, beyond, length, backward=False, max_error=4.0, **options),
        "extend-beyond-5": lambda: op.extension(pipe, beyond, 5, backward=False, max_error=4.0, **options),
        "connect": lambda: op.connection(pipe, short, 5, 4, max_error=1.5, **options),
        "connect-pictures": lambda: op.connection(pipe, pictures, 1, 1, max_error=1.5, **options),
        "loop": lambda: op.loops(pipe, short, length, 12, **led),
        "loop-windows": lambda: op.loops(pipe, short, length, 16, **led),
    }


def long(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """Task name -> its measurement, for a causal model of shapes that bounce: a rollout of 40 trained lengths."""
    data = op.held_out(min(count, 48), pipe.config.num_frames, "bounce", pipe.config.height, seed=seed + 2)
    choices = {key: options[key] for key in ("num_inference_steps", "seed")}
    return {"rollout": lambda: rollout(pipe, data, 13, 40 * (pipe.config.num_frames - 1), **choices)}


def _read_tasks(args: argparse.Namespace, output: Path, tasks: Sequence[str], drawn: dict[str, int]) -> dict[str, dict]:
    """Task -> its measurements' values of each clip, of the file of --against; ValueError for one without these tasks."""
    saved = read_saved(args, "values", output, **drawn)
    if missing := [name for name in tasks if not isinstance(saved.get(name), dict)]:
        both = [name for name in tasks if name not in missing]
        remedy = f"add --tasks {' '.join(both)}" if both else f"give one of --tasks {' '.join(tasks)}"
        raise ValueError(f"{args.against} has no task {missing[0]}; {remedy}.")
    return saved


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure the tasks of every given model, and write metrics and contact sheets."""
    parser = command_parser("evaluate-tasks", __doc__)
    parser.add_argument("--model", help="a model trained on shapes that move straight")
    parser.add_argument("--bounce", help="a model trained on shapes that bounce")
    parser.add_argument("--rollout", help="a causal model trained on shapes that bounce")
    parser.add_argument("--tasks", nargs="+", help="measure only these tasks")
    parser.add_argument("--clips", type=int, default=96, help="of each task")
    parser.add_argument("--steps", type=int, default=30, help="of the solver")
    parser.add_argument("--seed", type=int, default=1, help="of clips and noise")
    parser.add_argument("--against", metavar="FILE", help=f"a tasks.json of these tasks and clips, {AGAINST}")
    args = parser.parse_args(argv)
    if not args.model and not args.bounce and not args.rollout:
        raise ValueError(
            "no model is given; use --model models/quickstart, --bounce models/bounce or --rollout models/rollout."
        )
    check_least(args, "clips", "steps")
    check_least(args, "seed", least=0)
    options = {"num_inference_steps": args.steps, "seed": args.seed, "progress": False, "batch_size": 48}
    given = ((args.model, straight), (args.bounce, bouncing), (args.rollout, long))
    chosen = [(path, suite) for path, suite in given if path]
    if args.against is not None and len(chosen) > 1:
        raise ValueError(f"--against compares one model, and {len(chosen)} are given; give one.")
    for path, suite in chosen:
        output = Path("output") / Path(path).name
        pipe = load(path)
        suite_of = suite(pipe, args.clips, args.seed, options)
        unknown = [name for name in args.tasks or [] if name not in suite_of]
        if unknown and (len(chosen) == 1 or unknown == args.tasks):  # of several models, each has tasks of its own
            raise ValueError(f"--tasks {unknown[0]!r} is not a task of this model; choose from {', '.join(suite_of)}.")
        tasks = [name for name in suite_of if name in (args.tasks or suite_of)]
        drawn = {"clips": args.clips, "seed": args.seed, "frames": pipe.config.num_frames, "size": pipe.config.height}
        saved = _read_tasks(args, output / "tasks.json", tasks, drawn) if args.against is not None else {}
        (output / "tasks").mkdir(parents=True, exist_ok=True)
        figures: list[dict] = []
        values: dict[str, dict[str, list]] = {}
        for name in tasks:
            result = suite_of[name]()
            print(*result.metrics, sep="\n", flush=True)
            if result.clips:
                write_contact_sheet(output / "tasks" / f"{name}.png", result.clips, columns=2, count=9)
            found = [finite(metric._asdict()) for metric in result.metrics]
            values[name] = {one["name"]: each for one in found if (each := one.pop("values")) is not None}
            figures += found
            ours = ((one["name"], one["unit"], values[name].get(one["name"], ())) for one in found)
            print_differences(ours, saved.get(name, {}), args.against)
            # After every task, since all of them may take an hour.
            write_json(output / "tasks.json", {**vars(args), **drawn, "figures": figures, "values": values})
        print(f"{args.clips} clips each; {output / 'tasks.json'}, {output / 'tasks'}")
    return 0

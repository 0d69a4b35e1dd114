"""Measure the tasks on moving shapes, against the truth: extend, connect, loop, interpolate, inpaint, edit, animate.

stdit evaluate-tasks --model models/quickstart --bounce models/bounce --rollout models/rollout --clips 96

`--model` was trained on shapes that move straight (configs/quickstart.yaml; or configs/extend.yaml, without labels), `--bounce` on shapes that bounce
(configs/bounce.yaml), `--rollout` is causal (configs/rollout.yaml). Figures go to output/NAME/tasks.json, a contact sheet of each task to output/NAME/tasks/; an
orange line marks frames that were made, truth stands above.
"""

from collections.abc import Sequence
from pathlib import Path

from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES
from stdit.data.video_write import write_contact_sheet
from stdit.evaluation import operations as op
from stdit.evaluation.rollouts import rollout
from stdit.files import write_json
from stdit.recipes.entry import command_parser
from stdit.recipes.models import load_pipeline
from stdit.sampling.pipeline import STDiTPipeline


def load(path: str) -> STDiTPipeline:
    """A pipeline trained on moving shapes. ValueError for any other: the measurements know only those."""
    pipe = load_pipeline(path)
    names = pipe.transformer.config.class_names
    known = sorted(names or []) == sorted(CLASS_NAMES) or (names and set(names) <= set(OBJECT_NAMES))
    if pipe.transformer.num_classes and not known:
        raise ValueError(f"{path} was not trained on moving shapes; only those can be measured here.")
    return pipe


def straight(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """(task, function) for a model of shapes that move straight."""
    data = op.held_out(count, pipe.config.num_frames, "straight", pipe.config.height, seed=seed)
    if not pipe.transformer.num_classes:  # nothing but what is known says where the object goes
        return {
            "extend-forward": lambda: op.extension(pipe, data, 5, backward=False, max_error=2.0, **options),
            "extend-backward": lambda: op.extension(pipe, data, 8, backward=True, max_error=2.0, **options),
        }
    labelled = {**options, "guidance_scale": 2.0}
    return {
        "extend-forward": lambda: op.extension(pipe, data, 5, backward=False, max_error=2.0, **labelled),
        "extend-backward": lambda: op.extension(pipe, data, 8, backward=True, max_error=2.0, **labelled),
        "interpolate": lambda: op.interpolation(pipe, data, 2, **labelled),
        "inpaint": lambda: op.inpainting(pipe, data, **labelled),
        "edit-0.3": lambda: op.editing(
            pipe, data, 0.3, min_share=0.9, new_label=False, **{**options, "guidance_scale": 1.0}
        ),
        "edit-0.8": lambda: op.editing(
            pipe, data, 0.8, min_share=0.8, new_label=True, **{**options, "guidance_scale": 5.0}
        ),
        "animate": lambda: op.animation(pipe, data, **{**options, "guidance_scale": 3.0}),
        "known": lambda: op.known_frames(pipe, data, **labelled),
        "sizes": lambda: op.sizes(pipe, count, **{**options, "guidance_scale": 3.0}),
    }


def bouncing(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """(task, function) for a model of shapes that bounce."""
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
    """(task, function) for a causal model of shapes that bounce: 40 times the length it was trained at."""
    data = op.held_out(min(count, 48), pipe.config.num_frames, "bounce", pipe.config.height, seed=seed + 2)
    choices = {**{key: options[key] for key in ("num_inference_steps", "seed")}, "guidance_scale": 2.0}
    return {"rollout": lambda: rollout(pipe, data, 13, 40 * (pipe.config.num_frames - 1), **choices)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks of every model that is given, and write metrics and contact sheets."""
    parser = command_parser("evaluate-tasks", __doc__)
    parser.add_argument("--model", help="trained on shapes that move straight")
    parser.add_argument("--bounce", help="trained on shapes that bounce")
    parser.add_argument("--rollout", help="a causal model, trained on shapes that bounce")
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if not args.model and not args.bounce and not args.rollout:
        raise ValueError("name a model: --model models/quickstart, --bounce models/bounce, --rollout models/rollout.")
    options = {"num_inference_steps": args.steps, "seed": args.seed, "progress": False, "batch_size": 48}
    for path, suite in ((args.model, straight), (args.bounce, bouncing), (args.rollout, long)):
        if not path:
            continue
        output = Path("output") / Path(path).name
        (output / "tasks").mkdir(parents=True, exist_ok=True)
        suite_of = suite(load(path), args.clips, args.seed, options)
        if args.tasks and not set(args.tasks) & set(suite_of):
            raise ValueError(f"--tasks {' '.join(args.tasks)}: {path} has none of them, but {', '.join(suite_of)}.")
        metrics = []
        for name, run in suite_of.items():
            if args.tasks and name not in args.tasks:
                continue
            result = run()
            metrics += result.metrics
            print(*result.metrics, sep="\n", flush=True)
            if result.clips:
                write_contact_sheet(output / "tasks" / f"{name}.png", result.clips, columns=2, count=9)
        write_json(output / "tasks.json", {**vars(args), "figures": [f._asdict() for f in metrics]})
        print(f"{args.clips} clips each; {output / 'tasks.json'}, {output / 'tasks'}")
    return 0

"""Measure the tasks on moving shapes, against the truth: extend, connect, loop, interpolate, inpaint, edit, animate.

stdit evaluate-tasks --model models/quickstart --bounce models/bounce --rollout models/rollout --clips 96

`--model` was trained on shapes that move straight (configs/quickstart.yaml; or configs/extend.yaml, without labels), `--bounce` on shapes that bounce
(configs/bounce.yaml), `--rollout` is causal (configs/rollout.yaml). Figures go to output/NAME/tasks.json, a contact sheet of each task to output/NAME/tasks/; an
orange line marks frames that were made, truth stands above.
"""

import json
from pathlib import Path

import torch

from stdit.data.shapes import CLASS_NAMES, OBJECT_NAMES
from stdit.data.video_write import write_contact_sheet
from stdit.evaluation import operations as op
from stdit.evaluation.rollouts import rollout
from stdit.recipes.entry import command_parser
from stdit.sampling.pipeline import STDiTPipeline
from stdit.training.run import write_text


def load(path: str) -> STDiTPipeline:
    pipe = STDiTPipeline.from_pretrained(path)
    names = pipe.transformer.config.class_names
    known = sorted(names or []) == sorted(CLASS_NAMES) or (names and set(names) <= set(OBJECT_NAMES))
    if pipe.transformer.num_classes and not known:
        raise ValueError(f"{path} was not trained on moving shapes; this judge knows only those.")
    return pipe.to("cuda") if torch.cuda.is_available() else pipe


def straight(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """(task, function) for a model of shapes that move straight."""
    data = op.held_out(count, pipe.config.num_frames, "straight", pipe.config.height, seed)
    if not pipe.transformer.num_classes:  # nothing but what is known says where the object goes
        return {
            "extend-forward": lambda: op.extension(pipe, data, 5, False, 2.0, **options),
            "extend-backward": lambda: op.extension(pipe, data, 8, True, 2.0, **options),
        }
    labelled = {**options, "guidance_scale": 2.0}
    return {
        "extend-forward": lambda: op.extension(pipe, data, 5, False, 2.0, **labelled),
        "extend-backward": lambda: op.extension(pipe, data, 8, True, 2.0, **labelled),
        "interpolate": lambda: op.interpolation(pipe, data, 2, **labelled),
        "inpaint": lambda: op.inpainting(pipe, data, **labelled),
        "edit-0.3": lambda: op.editing(pipe, data, 0.3, 0.9, False, **{**options, "guidance_scale": 1.0}),
        "edit-0.8": lambda: op.editing(pipe, data, 0.8, 0.8, True, **{**options, "guidance_scale": 5.0}),
        "animate": lambda: op.animation(pipe, data, **{**options, "guidance_scale": 3.0}),
        "known": lambda: op.placing(pipe, data, **labelled),
        "sizes": lambda: op.sizes(pipe, count, **{**options, "guidance_scale": 3.0}),
    }


def bouncing(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """(task, function) for a model of shapes that bounce."""
    length, size = pipe.config.num_frames, pipe.config.height
    led, options = {**options, "history_guidance": 2.0}, {**options, "history_guidance": 1.5}
    short, pictures, beyond = (op.held_out(count, n, "bounce", size, seed + 1) for n in (length, 18, length + 16))
    return {
        "extend-bounce": lambda: op.extension(pipe, short, 5, False, 2.0, **options),
        "extend-beyond": lambda: op.extension(pipe, beyond, length, False, 4.0, **options),
        "extend-beyond-5": lambda: op.extension(pipe, beyond, 5, False, 4.0, **options),
        "connect": lambda: op.connection(pipe, short, 5, 4, 1.5, **options),
        "connect-pictures": lambda: op.connection(pipe, pictures, 1, 1, 1.5, **options),
        "loop": lambda: op.loops(pipe, short, length, 12, **led),
        "loop-windows": lambda: op.loops(pipe, short, length, 16, **led),
    }


def long(pipe: STDiTPipeline, count: int, seed: int, options: dict):
    """(task, function) for a causal model of shapes that bounce: 40 times the length it was trained at."""
    data = op.held_out(min(count, 48), pipe.config.num_frames, "bounce", pipe.config.height, seed + 2)
    choices = {**{key: options[key] for key in ("num_inference_steps", "seed")}, "guidance_scale": 2.0}
    return {"rollout": lambda: rollout(pipe, data, 13, 40 * (pipe.config.num_frames - 1), **choices)}


def main(argv: list[str] | None = None) -> int:
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
        unknown = [name for name in args.tasks or [] if name not in suite_of]
        if unknown and args.tasks == unknown:
            raise ValueError(f"--tasks {unknown[0]} is none of {', '.join(suite_of)}.")
        figures = []
        for name, run in suite_of.items():
            if args.tasks and name not in args.tasks:
                continue
            outcome = run()
            figures += outcome.figures
            print(*outcome.figures, sep="\n", flush=True)
            if outcome.clips:
                write_contact_sheet(output / "tasks" / f"{name}.png", outcome.clips, columns=2, count=9)
        write_text(
            output / "tasks.json", json.dumps({**vars(args), "figures": [f._asdict() for f in figures]}, indent=1)
        )
        print(f"{args.clips} clips each; {output / 'tasks.json'}, {output / 'tasks'}")
    return 0

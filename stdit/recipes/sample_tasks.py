"""The tasks of `stdit sample`: how many inputs each takes, and its options."""

import argparse
from typing import NamedTuple


class Task(NamedTuple):
    """A value of `--task`.

    inputs: the number of --input files. options: those of `TASK_OPTIONS`, and --frames, that it uses. trims: whether
    --frames shortens the input. keeps_image: whether an image as input gives an image.
    """

    inputs: int
    options: tuple[str, ...]
    trims: bool = False
    keeps_image: bool = False


TASKS = {
    "generate": Task(0, ("frames",)),
    "animate": Task(1, ("frames",)),
    "extend": Task(1, ("after", "before", "frames"), trims=True),
    "connect": Task(2, ("frames",)),
    "loop": Task(1, ("frames",)),
    "interpolate": Task(1, ("factor", "frames"), trims=True),
    "inpaint": Task(1, ("mask", "frames"), trims=True, keeps_image=True),
    "edit": Task(1, ("strength", "frames"), trims=True, keeps_image=True),
}
# Options of single tasks, with their defaults.
TASK_OPTIONS = {
    "after": 0,
    "before": 0,
    "mask": None,
    "strength": 0.6,
    "factor": 2,
}


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for a wrong number of inputs, or an option of a different task."""
    task = TASKS[args.task]
    for name, default in TASK_OPTIONS.items():
        if getattr(args, name) != default and name not in task.options:
            users = [other for other, spec in TASKS.items() if name in spec.options]
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} belongs to --task {' or '.join(users)}, not to {args.task}; leave it out.")
    if len(args.input) != task.inputs:
        raise ValueError(f"--task {args.task} takes {task.inputs} --input file(s), {len(args.input)} given.")
    if args.task == "inpaint" and not (args.mask or args.height or args.width):
        raise ValueError("--task inpaint needs a --mask, or room around the picture: a larger --height or --width.")

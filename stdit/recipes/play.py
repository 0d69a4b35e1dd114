"""Play a world: a page on this machine that goes on as you press keys, beside the truth where the environment is installed.

stdit play                          the room that ships; records and trains it first if there is no model of it
stdit play models/NAME --steps 4
stdit play models/NAME --input clip.mp4

The page is at http://127.0.0.1:8000/ until Ctrl-C. It needs: pip install 'stdit[web]'
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.conditions import Actions
from stdit.data.inputs import read_input
from stdit.data.video_write import to_uint8
from stdit.pixels import to_float
from stdit.recipes import cache_latents, record, train
from stdit.recipes.entry import check_least, command, command_parser
from stdit.recipes.models import load_pipeline
from stdit.sampling.checks import check_world
from stdit.sampling.options import WORLD_OPTIONS, SamplingOptions, add_flags, options_from
from stdit.sampling.pipeline import STDiTPipeline
from stdit.worlds.environments import Environment, environment_of, frames_of_action
from stdit.worlds.record import read_info

ROOM = Path("models/room")
EPISODES, FRAMES = 3000, 25
FIRST_SEED = 1_000_000  # of what is played: beyond all that is recorded


def make_room() -> int:
    """Record the room that ships, encode it and train a model of it; goes on where it was stopped."""
    began = time.time()
    print("1/3  recording the room")
    recorded = [
        "room",
        "--episodes",
        str(EPISODES),
        "--frames",
        str(FRAMES),
        "--repeat",
        "4",
        "--label",
        "object_name",
        "--lossless",
        "--output",
        "data/room",
    ]
    record.main(recorded)
    print("2/3  encoding it with the tiny VAE")
    clips = ["data.root=data/room", "data.manifest=data/room/manifest.jsonl", "data.source=videos"]
    cache_latents.main(["room", *clips, "--output", "data/room_latents"])
    print("3/3  training")
    code = train.run(["room"])
    if code == 0:
        print(f"made in {(time.time() - began) / 60:.1f} minutes")
    return code


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page of a model, which is made first if it is that of the room."""
    parser = command_parser("play", __doc__)
    parser.add_argument("model", nargs="?", help="folder of a causal model with actions; default: the room that ships")
    add_flags(parser, WORLD_OPTIONS, num_inference_steps=6)
    parser.add_argument("--input", help="a clip or picture to begin from; default: a new episode of the environment")
    parser.add_argument("--class-label", help="of what --input shows, for a model with classes")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--sessions", type=int, default=2, help="tabs that can play at the same time, each its own world"
    )
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    args = parser.parse_args(argv)
    check_least(args, "sessions")
    try:
        from stdit.web.play import Stage
        from stdit.web.server import Worker, make_app, open_port, serve
    except ImportError as error:
        raise ValueError(f"the page needs starlette and uvicorn ({error}): pip install 'stdit[web]'.") from error
    opened = open_port(args.port)
    try:
        if args.model is None and not (ROOM / "model_index.json").is_file() and (code := make_room()):
            return code
        model = Path(args.model) if args.model else ROOM
        pipe = load_pipeline(model)
        options = options_from(args, progress=False)
        actions = check_world(pipe.engine, options)
        pipe.labels(args.class_label)  # raises for one that is unknown
        frames_of_action(actions.space, pipe.video_vae.stride[0])
        branches = pipe.engine.guidance(options).branches
        begin = Beginnings(pipe, options, actions, args)
        worker = Worker()
        stage = Stage(
            begin, actions, fps=pipe.config.fps, evaluations=args.steps * branches + 1,
            title=f"{model.name}", recordings=Path("output") / model.name / "played", sessions=args.sessions,
        )  # fmt: skip
        app = make_app(stage.routes(worker), worker)
        serve(app, opened, browser=not args.no_browser)
    finally:
        opened.close()
    return 0


class Beginnings:
    """Makes worlds that begin with a clip of the user's, with an episode of the environment, or with the model's own frame."""

    def __init__(self, pipe: STDiTPipeline, options: SamplingOptions, actions: Actions, args: argparse.Namespace):
        self.pipe, self.options = pipe, options
        self.label: int | str | None = args.class_label
        self.size = (pipe.config.height, pipe.config.width)
        self.clip = None if args.input is None else self._read(args.input)
        self.about: Any = actions.space.environment
        if self.clip is None and self.about is not None:
            try:
                environment_of(self.about)
            except ValueError as error:
                print(f"without the truth beside it, and from a frame of the model's own: {error}")
                self.about = None

    def __call__(self, seed: int, truth: Environment | None = None) -> tuple[Any, np.ndarray, Environment | None]:
        """A world, its frames so far, and the environment that goes on beside it. truth: one that can be used again."""
        clip, label = self.clip, self.label
        if clip is None and self.about is not None:
            truth = truth or environment_of(self.about)
            _, info = truth.reset(FIRST_SEED + seed)
            clip = to_float(truth.picture(self.size)[None])[None]
            if label is None and self.about.get("label") and self.pipe.transformer.num_classes:
                label = read_info(info, self.about["label"], truth)
        options = self.options
        if clip is None:  # the noise alone says how it begins
            assert isinstance(options.seed, int)
            options = replace(options, seed=options.seed + seed)
        world = self.pipe.world(clip, label, options=options)
        frames = np.zeros((0, *self.size, 3), np.uint8) if clip is None else to_uint8(clip[0])
        return world, frames, truth

    def _read(self, path: str) -> torch.Tensor:
        found = read_input(path, self.size, self.pipe.config.fps).pixels
        stride = self.pipe.video_vae.stride[0]
        whole = (found.shape[2] - 1) // stride * stride + 1
        if whole < found.shape[2]:
            print(f"{path}: the last {found.shape[2] - whole} frames are no whole group of {stride}, and are left out")
        return found[:, :, :whole]

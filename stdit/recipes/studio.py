"""A page on this machine with a timeline on which clips, pictures and gaps are laid and filled by a trained model.

stdit studio                        the models under models/, the newest first
stdit studio models/NAME --port 0

Generate, animate, extend, connect, loop, interpolate, inpaint, outpaint and edit, by label or caption; every version is
kept with its settings as a command line; training runs are shown beside it. Uploads and results lie in output/studio.
The page is at http://127.0.0.1:8000/ until Ctrl-C. It needs: pip install 'stdit[web]'
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stdit.recipes import sample, sampling
from stdit.recipes.entry import command, command_parser, one_line
from stdit.recipes.models import checkpoint_folder, load_pipeline
from stdit.sampling.pipeline import STDiTPipeline


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page."""
    parser = command_parser("studio", __doc__)
    parser.add_argument("model", nargs="?", help="folder of a model that is chosen first; default: the newest")
    parser.add_argument("--models", default="models", help="folder of the models to choose from (default: models)")
    parser.add_argument(
        "--output", default="output/studio", help="folder of uploads and results (default: output/studio)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    args = parser.parse_args(argv)
    try:
        from stdit.web.server import make_app, open_port, serve
    except ImportError as error:
        raise ValueError(f"the page needs starlette and uvicorn ({error}): pip install 'stdit[web]'.") from error
    opened = open_port(args.port)
    try:
        chosen = {} if args.model is None else chosen_model(Path(args.model))
        studio = make_studio(Path(args.models), Path(args.output), Path("output"), chosen)
        listed = studio.models.listing()
        usable = [model["name"] for model in listed if "error" not in model]
        if chosen and "error" in listed[0]:
            raise ValueError(f"{args.model} cannot be read: {listed[0]['error']}")
        if not usable:
            raise ValueError(f"there is no model under {args.models}/; make one with make quickstart, or stdit train.")
        studio.worker.begin(studio.models.facts, usable[0])  # it is loaded when the page asks for it
        serve(make_app(studio.routes(), studio.worker, studio.close), opened, browser=not args.no_browser)
    finally:
        opened.close()
    return 0


def chosen_model(path: Path) -> dict[str, Path]:
    """The model or checkpoints that a path means, by name; ValueError if it means neither."""
    checkpoints = checkpoint_folder(path)
    if checkpoints is None and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} holds no model (model_index.json) and no checkpoint (step-N); give a folder that training wrote, such "
            "as models/NAME."
        )
    return {path.resolve().name: checkpoints or path}


def make_studio(models: Path, output: Path, runs: Path, chosen: Mapping[str, Path] | None = None) -> Any:
    """The studio of the models in a folder. output: where it writes. runs: of training. chosen: models that come first."""
    from stdit.web.server import Worker
    from stdit.web.studio import Studio
    from stdit.web.studio_models import Models
    from stdit.web.studio_runs import Runs

    return Studio(Models(models, load_pipeline, chosen), _sample, output, Runs(runs), worker=Worker())


def _sample(argv: list[str], pipe: STDiTPipeline, progress: Any) -> Any:
    """Do what `stdit sample ARGV` does with a pipeline that is loaded; Refused, in one line, for what a user can cause."""
    from stdit.web.studio import Made
    from stdit.web.studio_problems import Refused

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            args = sample.parse(argv)
        made = sampling.sample_clips(args, pipe, Path(args.model), progress=progress, say=lambda text: None)
    except SystemExit as error:
        raise Refused(f"this is no command: stdit sample {' '.join(argv)[:200]}") from error
    except Exception as error:
        said = one_line(error)
        if said is None:
            raise
        raise Refused(said) from error
    return Made(made.paths, made.size, made.fps, made.warnings)

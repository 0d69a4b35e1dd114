"""The `stdit` command: `stdit COMMAND ...` calls a recipe. A recipe is imported only when its command runs."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import stdit
from stdit.variants import nearest

# Command -> one line of help. The recipe is the module of that name, with "_" for "-".
COMMANDS = {
    "quickstart": "draw moving shapes, cache, train, sample and show the tasks",
    "train": "train a model from a config; the same command resumes",
    "sample": "sample clips, or edit and continue clips and pictures of your own",
    "cache-latents": "encode the clips of a config once, so that training reads latents",
    "export": "write models/NAME from the newest checkpoint of a run, or a model with LoRAs in its weights",
    "average": "average a run's weights over the length that its held-out loss, or you, choose",
    "evaluate": "measure a model or clips: shapes, captions, Fréchet distances",
    "evaluate-world": "measure whether a world obeys its actions (stdit evaluate --world is the same)",
    "evaluate-tasks": "measure extend, connect, inpaint and the other tasks on moving shapes",
    "held-out-loss": "loss on held-out clips by mask strategy and noise level",
    "compare": "train variants of a config on one budget and compare them",
    "info": "what trained models are: their clips, labels, captions and actions",
    "plan": "memory, speed and days of a run on a GPU, before it starts",
    "convert": "convert weights of DiT, SiT, Latte, U-ViT, MDT or diffusers, and back",
    "record": "record episodes of an environment, with the actions that led to every frame",
    "play": "play a world in the browser: frames go on as you press keys",
    "split": "cut long videos at scene changes into clips of one length and rate, with a manifest",
    "caption": "write the captions of a manifest's clips by a vision-language model",
    "studio": "a page with a timeline: clips, pictures and gaps are laid and filled in the browser",
    "make-shapes": "draw clips of moving shapes, with a manifest",
    "index": "read every file of a folder or manifest once, and keep a table that runs of any size open at once",
    "check-media": "read every file of a folder in full and say which training cannot use",
    "model-table": "parameters and Gflops of every model size",
    "plot-runs": "loss and samples of several runs in one picture",
    "train-vae": "train the tiny VAE",
    "bench": "measure speed: loader, training step, attention, VAE, packing, growth to a million rows, and beside DiT and Latte",
    "bench-memory": "compare the planned peak of memory with real runs",
    "gpu-check": "check and measure on this machine what needs a GPU",
    "completion": "print what makes bash, zsh or fish complete commands, options, configs and models",
}


# Command -> the module whose `read_arguments` finds errors before the recipe is imported, which takes seconds.
ARGUMENTS = {"train": "train_arguments"}

# What `stdit COMMAND --help` prints (dev/make_help.py), so that it takes no seconds of imports.
HELP = Path(__file__).parent / "help"


def usage() -> str:
    """The text of `stdit --help`."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        f"usage: stdit COMMAND ...\n\n{stdit.__doc__}\n\ncommands:\n{commands}\n\n"
        "stdit COMMAND --help lists the options of a command. A config is a path, or the name of a config in the package:\n"
        "  stdit train quickstart data.root=data/shapes train.steps=100"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    from stdit.recipes.entry import run

    return run(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(arguments: Sequence[str] | None) -> int:
    arguments = list(arguments or ())
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"stdit {stdit.__version__}")
        return 0
    name = arguments[0].replace("_", "-")
    if name not in COMMANDS:
        print(
            f"Unknown command {arguments[0]!r}.{nearest(name, COMMANDS)} Choose one of: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    text = HELP / f"{name}{'-world' if '--world' in arguments else ''}.txt"
    if {"-h", "--help"} & set(arguments[1:]) and text.is_file():
        print(text.read_text(encoding="utf-8"), end="")
        return 0
    if name in ARGUMENTS:
        importlib.import_module(f"stdit.recipes.{ARGUMENTS[name]}").read_arguments(arguments[1:])
    return importlib.import_module(f"stdit.recipes.{name.replace('-', '_')}").main(arguments[1:])

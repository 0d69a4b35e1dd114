"""Choose the length of the averaged weights after training: the one with the least loss on held-out clips.

stdit average own_videos                         tries lengths about those of train.average_lengths
stdit average own_videos --length 0.07           of this length, measured or not

The run needs train.average_lengths=[0.05,0.1], and train.holdout to choose by. A length is a share of the training.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stdit.config import Config
from stdit.data.datasets import Dataset
from stdit.data.indexed import build_indexed
from stdit.diffusion.objective import build_objective
from stdit.legacy import renamed_parameter
from stdit.recipes.build import build_accelerator, build_captions, build_teacher, split_holdout
from stdit.recipes.entry import command, command_parser
from stdit.recipes.models import CHECKPOINTS, config_of, find_checkpoint, pipeline_of
from stdit.training.averages import Snapshot, average, read_snapshots, weights_of
from stdit.training.fit import BadFiles, Trainer
from stdit.training.held_out import HeldOutDraws
from stdit.training.results import replace_model
from stdit.training.run import RunFolders
from stdit.vae import VideoVAE

LENGTHS_TRIED = 9


def lengths_between(snapshots: Sequence[Snapshot], lengths: Sequence[float], step: int) -> list[float]:
    """Lengths to try: those of training, and others about them, as far as the snapshots give them; ValueError if none."""
    low, high = 0.8 * min(lengths), 1.5 * max(lengths)
    tried = [min(0.288, low * (high / low) ** (i / (LENGTHS_TRIED - 1))) for i in range(LENGTHS_TRIED)]
    found = [length for length in sorted({*tried, *lengths}) if _gives(snapshots, length, step)]
    if not found:
        weights_of(snapshots, lengths[0], step)  # which says why
    return found


def _gives(snapshots: Sequence[Snapshot], length: float, step: int) -> bool:
    try:
        weights_of(snapshots, length, step)
    except ValueError:
        return False
    return True


def _clips(config: Config) -> tuple[Dataset, Dataset, HeldOutDraws]:
    """The clips of a run, those it trained on, and those it held out; ValueError if it held nothing out."""
    dataset = build_indexed(config.data)
    kept, held_out = split_holdout(config, dataset)
    if held_out is None:
        raise ValueError(
            f"the run {config.name!r} held no clips out, so no length can be chosen by their loss; give --length, or train "
            "with train.holdout=0.1."
        )
    return dataset, kept, held_out


def _trainer(config: Config, model: nn.Module, vae: VideoVAE, *, dataset: Dataset, trained_on: Dataset) -> Trainer:
    """What measures the loss of a run."""
    accelerator = build_accelerator(config.train.precision)
    captions = build_captions(config, dataset, accelerator.device)
    return Trainer(
        accelerator, RunFolders(config.name), model.to(accelerator.device), [],
        config=config.train, resolved={}, objective=build_objective(config.objective), vae=vae.to(accelerator.device),
        bad_files=BadFiles(len(trained_on), config.data.max_bad_fraction), captions=captions,
        teacher=build_teacher(config, vae, accelerator.device),
    )  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Choose a length, print what was tried, and write the model."""
    parser = command_parser("average", __doc__)
    parser.add_argument(
        "run", metavar="NAME", help="name of a run, the folder of its checkpoints, or one of them (step-N)"
    )
    parser.add_argument("--length", type=float, help="the length, as a share of the training; default: the best")
    parser.add_argument("--output", type=Path, help="default: models/NAME-average")
    args = parser.parse_args(argv)
    given = Path(args.run)
    folder = given if given.is_dir() else CHECKPOINTS / given.name
    checkpoint = find_checkpoint(folder)
    run = checkpoint.path.absolute().parent
    output = args.output or Path("models") / f"{run.name}-average"
    if output.exists():
        raise ValueError(f"{output} exists; choose another --output.")
    config, snapshots = config_of(checkpoint), read_snapshots(run / "averages", checkpoint.step)
    # What cannot be is refused before the model is loaded.
    if args.length is None:
        dataset, trained_on, held_out = _clips(config)
        lengths = lengths_between(snapshots, config.train.average_lengths, checkpoint.step)
    else:
        weights_of(snapshots, args.length, checkpoint.step)
    pipe = pipeline_of(checkpoint)
    model = pipe.transformer

    def use(length: float) -> None:
        values = average(snapshots, length, checkpoint.step)
        model.load_state_dict({renamed_parameter(name): value for name, value in values.items()}, strict=False)

    length = args.length
    if length is None:
        trainer = _trainer(config, model, pipe.video_vae, dataset=dataset, trained_on=trained_on)

        @torch.no_grad()
        def measured() -> float:
            return held_out.losses(trainer.loss_of).double().mean().item()

        print(f"held-out loss of the average in training (train.ema_decay={config.train.ema_decay}): {measured():.5f}")
        found = {}
        for tried in lengths:
            use(tried)
            found[tried] = measured()
            print(f"  length {tried:.3f}: {found[tried]:.5f}", flush=True)
        length = min(found, key=found.__getitem__)
    use(length)
    replace_model(pipe, output)
    print(f"{checkpoint.path}, weights averaged over a length of {length:.3f}: {output}")
    return 0

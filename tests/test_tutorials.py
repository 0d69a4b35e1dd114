"""Every command and every block of Python in docs/tutorials runs, in order, with tiny models and a few steps."""

import glob
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from stdit.data.video_write import write_video
from stdit.model.stdit import STDiT
from stdit.recipes import cli
from stdit.recipes.entry import child_environment

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"

SMALL = [
    "model.hidden_size=32", "model.num_heads=2", "train.steps=2", "train.decay_steps=null", "train.warmup_steps=0",
    "train.batch_size=2", "train.micro_batch=null", "train.samples=2", "train.sample_steps=2", "train.precision=fp32",
    "data.workers=0",
]  # fmt: skip
SMALL_VIDEO = ["vae.name=tiny", "data.height=32", "data.width=32", "data.num_frames=5", "data.fps=null"]
# Further arguments of a command in a tutorial, by the beginning of the command; the longest that fits is taken.
SHRUNK = {
    "quickstart": ["--num-clips", "24", *SMALL, "model.depth=2", "train.guide_step=null"],
    "train quickstart": [*SMALL, "train.guide_step=null"],
    "train --data": [*SMALL, "model.depth=1", "train.preview_every=9"],
    "train video": [*SMALL, *SMALL_VIDEO, "model.depth=2"],
    "train video_from_dit": [*SMALL[2:], "data.height=32", "data.width=32", "data.num_frames=2", "data.fps=null", "model.size=S/2", "model.depth=4"],
    "cache-latents": SMALL_VIDEO,
    "plan": ["model.size=S/2", "model.depth=2", *SMALL_VIDEO],
    "plan video_from_dit": ["data.height=32", "data.width=32", "model.size=S/2", "model.depth=4"],
    "make-shapes": ["--num-clips", "24"],
    "cache-latents quickstart": [],
    "sample": ["--steps", "2"],
    "evaluate": ["--clips", "2", "--steps", "2"],
}  # fmt: skip


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the blocks of code of a tutorial; the language is empty for commands."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", (TUTORIALS / page).read_text(), flags=re.S | re.M)


def run(line: str) -> None:
    """Run a command of a tutorial, with what makes it small."""
    words = [path for word in shlex.split(line) for path in (sorted(glob.glob(word)) or [word])]
    command = words[words.index("stdit") + 1 :]
    fits = [name for name in SHRUNK if " ".join(command).startswith(name)]
    more = SHRUNK[max(fits, key=len)] if fits else []
    command = [word for word in command if not word.startswith(("train.steps=", "train.decay_steps="))]
    given = {word.partition("=")[0] for word in command}
    more = [word for word in more if "=" not in word or word.partition("=")[0] not in given]
    if words[0] == "torchrun" and "train.parallel.shard=fsdp" not in words:
        words = words[words.index("stdit") :]  # one process, since starting two takes long
    if words[0] == "torchrun":
        code = [sys.executable, "-m", "torch.distributed.run", *words[1:], *more]
        subprocess.run(code, env={**child_environment(), "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
        return
    assert words[0] == "stdit" and cli.main([*command, *more]) == 0, line


def notebook_blocks(page: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the cells of code of a notebook; cells of commands begin with an exclamation mark."""
    for cell in json.loads((TUTORIALS / page).read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield ("", text.replace("!stdit", "stdit")) if text.startswith("!") else ("python", text)


def follow(page: str) -> None:
    """Run all of a tutorial in the current folder."""
    namespace: dict = {}
    for language, text in (notebook_blocks if page.endswith(".ipynb") else blocks)(page):
        if language == "python":
            exec(compile(text, page, "exec"), namespace)
        for line in text.splitlines() if not language else ():
            run(line)


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        write_video(tmp_path / f"clips/{i}.mp4", rng.integers(0, 255, (30, 48, 48, 3), np.uint8), fps=15)


def test_the_tutorial_of_a_laptop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    follow("laptop.md")
    assert Path("output/longer.mp4").is_file() and Path("longer.mp4").is_file()


def test_the_tutorial_of_own_clips(clips):
    follow("own-clips.md")
    assert (
        Path("output/mine-longer.mp4").is_file()
        and "held_out_loss" in Path("output/held/training_metrics.csv").read_text()
    )


def test_the_tutorial_of_dit_weights(clips):
    torch.manual_seed(0)
    image = STDiT.from_size("S/2", depth=2, num_classes=1000, in_channels=4, sample_size=(1, 4, 4), axes=["spatial"])
    image.save_pretrained("random")
    run("stdit convert random --to dit --output DiT-XL-2-256x256.pt")
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    vae.save_pretrained("stabilityai/sd-vae-ft-ema")
    follow("dit-weights.md")
    assert len(list(Path("output/images").glob("*.png"))) == 2 and Path("dit.pt").is_file()


def test_the_tutorial_of_many_gpus(clips):
    follow("many-gpus.md")
    assert json.loads(Path("output/sharded/summary.json").read_text())["processes"] == 2


def test_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    display = types.SimpleNamespace(Image=lambda path, **_: Path(path), display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    follow("first_clip.ipynb")
    assert len(shown) == 4 and all(path.is_file() for path in shown)


def test_every_tutorial_is_followed():
    text = Path(__file__).read_text()
    assert all(f'follow("{path.name}")' in text for path in TUTORIALS.glob("*.*"))

"""A folder as somebody has it who trained two models: models/, clips and pictures, and the curve of a run."""

import numpy as np
import pytest
from conftest import fill
from PIL import Image

from stdit.data.video_write import write_video
from stdit.model.stdit import STDiT
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.text import load_text_encoder
from stdit.vae import TinyVAE

STRATEGIES = ["ends", "every_kth", "motion", "per_frame", "prefix", "random", "region", "shared", "suffix"]


def moving(frames: int, height: int, width: int) -> np.ndarray:
    """A square that moves over a plane (F, H, W, 3) uint8."""
    clip = np.full((frames, height, width, 3), 40, np.uint8)
    for i in range(frames):
        clip[i, height // 4 : height // 2, i % (width - 8) : i % (width - 8) + 8] = (230, 140, 110)
    return clip


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    for name, causal in (("tiny", False), ("forward", True)):
        model = fill(
            STDiT(
                depth=2, hidden_size=32, num_heads=4, in_channels=16, num_classes=3, class_names=["red", "green", "blue"],
                learn_sigma=False, sample_size=(5, 4, 4), causal=causal,
                position_encoding="rope" if causal else "sincos+rope_3d", window=3 if causal else None,
            )
        ).eval()  # fmt: skip
        vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
        strategies = ["teacher_forcing"] if causal else STRATEGIES
        pipe = STDiTPipeline(model, vae, STDiTScheduler("flow"), 17, 32, 32, 8.0, "flow", mask_strategies=strategies)
        pipe.save_pretrained(folder / "models" / name)
    channels = load_text_encoder("words").channels
    model = fill(
        STDiT(
            depth=1,
            hidden_size=32,
            num_heads=4,
            in_channels=16,
            num_classes=0,
            learn_sigma=False,
            sample_size=(5, 4, 4),
            caption_channels=channels,
        )
    )
    pipe = STDiTPipeline(model.eval(), vae, STDiTScheduler("flow"), 17, 32, 32, 8.0, "flow", text_encoder="words")
    pipe.save_pretrained(folder / "models" / "texts")
    write_video(folder / "clip.mp4", moving(9, 32, 32), fps=8)
    write_video(folder / "other.mp4", moving(13, 32, 32), fps=8)
    write_video(folder / "wide.mp4", moving(9, 48, 96), fps=8)
    write_video(folder / "long.mp4", moving(700, 32, 32), fps=8)
    Image.fromarray(moving(1, 32, 32)[0]).save(folder / "picture.png")
    Image.fromarray((moving(1, 32, 32)[0] > 100).astype(np.uint8) * 255).convert("L").save(folder / "mask.png")
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(range(256)) * 20)
    run = folder / "output" / "run"
    (run / "samples").mkdir(parents=True)
    rows = "".join(f"{step},{1 / step},{0.001 * step}\n" for step in range(1, 3001))
    (run / "training_metrics.csv").write_text("step,loss,lr\n" + rows)
    for step in (100, 200):
        Image.fromarray(moving(1, 64, 128)[0]).save(run / "samples" / f"step-{step:07d}.png")
    return folder

"""A folder of clips with a manifest, of which tests make an index."""

import json
from pathlib import Path

from media import write_barcodes

from stdit.data.config import DataConfig
from stdit.data.samplers import ClipSize
from stdit.recipes import index

SIZES = [ClipSize(5, 32, 32), ClipSize(9, 32, 48), ClipSize(1, 32, 32)]


def write_clips(folder: Path) -> Path:
    """Write a manifest of clips of several lengths, one of them broken, with labels, captions and further columns."""
    folder.mkdir()
    rows = []
    for number, count in enumerate((20, 8, 12, 30, 6, 20)):
        name = f"clip é {number}.mp4"
        write_barcodes(folder / name, count, fps=24 if number % 2 else 12)
        rows.append({"path": name, "label": ["b", "a"][number % 2], "caption": f"clip «{number}»", "score": number})
    (folder / "clip é 4.mp4").write_bytes(b"no video")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(manifest, **settings):
    """The config of those clips by a manifest or an index."""
    return DataConfig(**{
        "root": "clips", "manifest": str(manifest), "num_frames": 5, "height": 32, "width": 32, "source": "videos",
        "sizes": [list(size) for size in SIZES], **settings,
    })  # fmt: skip


def make(*arguments):
    """Make `clips.index` of the manifest, by the command."""
    return index.main(["clips/manifest.jsonl", "--output", "clips.index", "--workers", "0", *arguments])

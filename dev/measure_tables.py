"""Time the reading of clips and rows of latents by number, at random, from every form that data have: milliseconds each.

python dev/measure_tables.py [--rows 500] [--bytes 200000]

Clips are random bytes of one size. Numbers are medians over all rows in a shuffled order, after one pass that opens what stays
open; the files are in the memory of the system. A store is a server of S3 on this machine.
"""

import argparse
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from store_server import environment, serving  # noqa: E402

from stdit.data import stores  # noqa: E402
from stdit.data.config import DataConfig  # noqa: E402
from stdit.data.datasets import build_dataset  # noqa: E402
from stdit.data.media import open_regular  # noqa: E402
from stdit.data.tensor_rows import TensorRows  # noqa: E402


def write(rows: int, size: int) -> None:
    """Write the same clips in every form, in this folder."""
    import datasets
    import lance
    import pyarrow

    datasets.disable_progress_bars()
    Path("clips").mkdir()
    clips = [np.random.default_rng(i).bytes(size) for i in range(rows)]
    for i, clip in enumerate(clips):
        Path(f"clips/{i:05d}.mp4").write_bytes(clip)
    Path("tar").mkdir()
    with tarfile.open("tar/0.tar", "w") as tar:
        for i in range(rows):
            tar.add(f"clips/{i:05d}.mp4", f"{i:05d}.mp4")
    table = datasets.Dataset.from_dict(
        {"video": [{"bytes": clip, "path": f"{i:05d}.mp4"} for i, clip in enumerate(clips)]},
        features=datasets.Features({"video": datasets.Video(decode=False)}),
    )
    table.save_to_disk("saved")
    Path("parquet").mkdir()
    table.to_parquet("parquet/0.parquet", batch_size=10)
    lance.write_dataset(pyarrow.table({"video": pyarrow.array(clips, pyarrow.large_binary())}), "clips.lance")
    Path("latents").mkdir()
    save_file({"latents": torch.randn(rows, 16, 5, 32, 32).half()}, "latents/0.safetensors")


def timed(name: str, count: int, read: Callable[[int], object]) -> None:
    """Print the first and the later readings of all rows, in milliseconds."""
    order = np.random.default_rng(0).permutation(count).tolist()
    passes = []
    for _ in range(2):
        each = []
        for i in order:
            begin = time.perf_counter()
            read(i)
            each.append(1e3 * (time.perf_counter() - begin))
        passes.append(statistics.median(each))
    print(f"{name:32} {passes[0]:8.3f} {passes[1]:8.3f}", flush=True)


def main() -> None:
    """Measure all forms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--bytes", type=int, default=200_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stdit-tables-"))
    os.chdir(folder)
    os.environ["STDIT_CACHE"] = str(folder / "cache")
    try:
        write(args.rows, args.bytes)
        print(f"{'':32} {'first':>8} {'later':>8}  ms a row of {args.bytes} bytes, median")
        plain = {"num_frames": 5, "height": 32, "width": 32, "source": "auto"}
        with serving(folder) as server:
            os.environ.update(environment(server))
            forms: dict[str, dict[str, str]] = {
                "files": {"root": "clips"}, "tar": {"root": "tar"}, "save_to_disk": {"root": "saved"},
                "parquet, groups of 10": {"root": "parquet"}, "lance": {"root": ".", "manifest": "clips.lance"},
                "files in a store": {"root": "s3://clips"}, "tar in a store": {"root": "s3://tar"},
            }  # fmt: skip
            for name, settings in forms.items():
                given = {**plain, **settings}
                if "manifest" in settings:
                    given["columns"] = {"path": "video"}
                table = build_dataset(DataConfig(**given))

                def read(i: int, table: object = table) -> bytes:
                    with open_regular(table.rows[i].path) as stream:
                        return stream.read()

                timed(name, len(table), read)
            stores.forget()
            file = safe_open("latents/0.safetensors", framework="pt")
            timed("latents, safetensors' own", args.rows, lambda i: file.get_slice("latents")[i])
            here, there = TensorRows(Path("latents/0.safetensors")), TensorRows(Path("s3://latents/0.safetensors"))
            timed("latents", args.rows, lambda i: here.row("latents", i))
            timed("latents in a store", args.rows, lambda i: there.row("latents", i))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

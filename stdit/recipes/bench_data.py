"""How fast clips are read, decoded and encoded (`stdit bench loader` and `quickstart`)."""

import argparse
import statistics
from itertools import islice
from pathlib import Path

import av
import torch

from stdit.data.datasets import DataConfig, build_dataset
from stdit.data.loader import batches
from stdit.data.manifest import VIDEO_SUFFIXES, scan_folder
from stdit.data.video_io import VideoError, VideoReader
from stdit.pixels import to_float
from stdit.precision import autocast
from stdit.recipes.machine import timed
from stdit.rng import keyed_rng
from stdit.vae import load_vae


def pyav_alone(paths: list[Path]) -> int:
    """Decode all frames of all files to RGB with PyAV alone; returns the number of frames."""
    count = 0
    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")
                count += 1
    return count


def our_reader(paths: list[Path]) -> int:
    """Decode all frames of all files with `VideoReader`; returns the number of frames."""
    count = 0
    for path in paths:
        with VideoReader(path) as reader:
            count += len(reader.get_frames(range(len(reader))))
    return count


def our_samples(dataset) -> int:
    """Read, scale and crop every clip as a training sample; returns the number of frames."""
    return sum(len(dataset.load(i, keyed_rng("sample", i))["pixels"]) for i in range(len(dataset)))


def bench_loader(args: argparse.Namespace) -> None:
    """Compare `VideoReader`, and the loader's samples, with PyAV alone on the same frames."""
    paths = [row.path for row in scan_folder(Path(args.root), VIDEO_SUFFIXES, "videos").rows]
    rates: dict[str, list[float]] = {"PyAV alone": [], "VideoReader": []}
    for _ in range(args.rounds):
        for name, function in (("PyAV alone", pyav_alone), ("VideoReader", our_reader)):
            frames = 0

            def run(function=function) -> None:
                nonlocal frames
                frames = function(paths)

            seconds = timed(run)
            rates[name].append(frames / seconds)
    base = statistics.median(rates["PyAV alone"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:<14} {rate:8.0f} frames/s   {rate / base:5.2f} of PyAV alone")
    config = DataConfig(root=args.root, source="videos", num_frames=17, height=128, width=128, workers=0)
    dataset = build_dataset(config)
    ours, alone = [], []
    for _ in range(args.rounds):
        ours.append(_samples_rate(dataset, args.samples))
        alone.append(_windows_rate(dataset, args.samples))
    print(
        f"windows of 17 frames, decoded, scaled to 128 px, collated: {statistics.median(ours):.1f} clips/s; PyAV alone, the same frames, no scaling: {statistics.median(alone):.1f} clips/s; ratio {statistics.median(o / a for o, a in zip(ours, alone, strict=True)):.2f}"
    )


def _samples_rate(dataset, count: int) -> float:
    stream = batches(dataset, 0, 1, workers=0)
    return count / timed(lambda: list(islice(stream, count)))


def _windows_rate(dataset, count: int) -> float:
    """Clips per second of PyAV alone, on the windows that `_samples_rate` reads, from the key frame before each."""
    from stdit.data.datasets import window
    from stdit.data.samplers import sample_index

    jobs = []
    for step in range(count):
        index = sample_index(0, step, len(dataset))
        rng = keyed_rng("sample", 0, step, 0)
        path = dataset.rows[index].path
        try:
            with VideoReader(path) as reader:
                picked = window(reader, 17, None, rng)
                assert reader._pts is not None
                jobs.append((path, reader._pts[picked[0]], reader._pts[picked[-1]]))
        except VideoError:
            continue

    def run() -> None:
        for path, first, last in jobs:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                container.seek(first, stream=stream, backward=True)
                for frame in container.decode(stream):
                    if frame.pts >= first:
                        frame.to_ndarray(format="rgb24")
                    if frame.pts >= last:
                        break

    return len(jobs) / timed(run)


@torch.no_grad()
def bench_quickstart(args: argparse.Namespace) -> None:
    """Measure reading and encoding of the quickstart's clips."""
    vae = load_vae("tiny")
    manifest = Path(args.root) / "manifest.jsonl"
    dataset = build_dataset(DataConfig(root=args.root, manifest=str(manifest), source="videos"))
    count, reading, encoding = min(args.samples, len(dataset)), 0.0, 0.0
    for first in range(0, count, 32):
        pixels: list[torch.Tensor] = []
        reading += timed(
            lambda first=first, pixels=pixels: pixels.extend(
                dataset.load(i, keyed_rng("sample", i))["pixels"] for i in range(first, min(first + 32, count))
            )
        )
        batch = to_float(torch.stack(pixels))
        with autocast("auto", "cpu"):
            encoding += timed(lambda batch=batch: vae.encode(batch))
    print(
        f"{count} clips: reading {reading:.1f} s ({count / reading:.0f} clips/s), encoding {encoding:.1f} s ({count / encoding:.0f} clips/s)"
    )

"""The files that `stdit sample` writes: their names, and how clips get into them."""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from stdit.data.video_write import SUFFIXES, VideoStream, write_video
from stdit.files import check_writable, is_file_name, plain_name


def output_paths(
    args: argparse.Namespace, model: Path, *, texts: Sequence[str], suffix: str, settings: dict
) -> list[Path]:
    """The path of each clip. ValueError if it, or the JSON file next to it, exists and --overwrite was not given.

    texts: what each clip shows (a class, a caption, or nothing), which becomes a part of its name. Names in a folder end in a hash of the settings, so that clips of different settings do not overwrite each other.
    """
    count = len(texts)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    if args.output and is_file_name(args.output):
        file = Path(args.output)
        numbered = [file.with_name(f"{file.stem}-{i:03d}{file.suffix}") for i in range(count)]
        paths = [file] if count == 1 else numbered
    else:
        folder = Path(args.output) if args.output else Path("output") / model.name / "samples"
        task = "" if args.task == "generate" else f"{args.task}-"
        names = [f"-{plain_name(text)}" if plain_name(text) else "" for text in texts]
        paths = [folder / f"{task}{i:03d}{name}-seed-{args.seed}-{digest}{suffix}" for i, name in enumerate(names)]
    unknown = [path for path in paths if path.suffix.lower() not in SUFFIXES]
    if unknown:
        raise ValueError(
            f"--output {unknown[0]}: cannot write {unknown[0].suffix}; use one of {', '.join(SUFFIXES)}, or end it with a slash for "
            "a folder."
        )
    refuse_existing(paths, args.overwrite)
    for path in paths:
        check_writable(path)
        check_writable(path.with_suffix(".json"))
    return paths


def refuse_existing(paths: list[Path], overwrite: bool) -> None:
    """ValueError if one of the files, or the JSON file next to it, exists, unless they may be overwritten."""
    existing = [file for path in paths for file in (path, path.with_suffix(".json")) if file.exists()]
    if existing and not overwrite:
        raise ValueError(f"{existing[0]} exists; choose another --output or --seed, or pass --overwrite.")


def write_clips(paths: list[Path], clips: torch.Tensor | Iterable[torch.Tensor], fps: float) -> Iterator[tuple]:
    """Write clips (B, 3, F, H, W), or a stream of their parts; yield (frames, height, width) per file."""

    def ready(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed while the clips were sampled
        return path

    if not isinstance(clips, torch.Tensor) and paths[0].suffix.lower() != ".mp4":
        clips = torch.cat(list(clips), dim=2)
    if isinstance(clips, torch.Tensor):
        for path, clip in zip(paths, clips, strict=True):
            write_video(ready(path), clip, fps=fps)
            yield tuple(clip.shape[1:])
        return
    frames, size = 0, ()
    with ExitStack() as open_files:
        videos = [open_files.enter_context(VideoStream(path, fps)) for path in paths]
        for part in clips:
            frames, size = frames + part.shape[2], tuple(part.shape[3:])
            for video, clip in zip(videos, part, strict=True):
                video.add(clip)
    for _ in paths:
        yield (frames, *size)

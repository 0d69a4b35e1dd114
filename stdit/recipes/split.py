"""Cut long videos at their scene changes into clips of one length and rate, with a manifest.

    stdit split film.mp4 talk.mov --output data/clips
    stdit split path/to/videos --output data/clips --frames 81 --fps 16 --size 480
    stdit train video data.root=data/clips data.manifest=data/clips/manifest.jsonl

Cuts are found by PySceneDetect (pip install 'stdit[split]'). Still and black clips are left out. The same command goes on
where it was stopped, takes further videos, and cuts clips again that are gone although manifest.jsonl names them; nothing
is overwritten. Captions: stdit caption data/clips/manifest.jsonl
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av

from stdit.data.manifest import find_media
from stdit.data.media import VIDEO_SUFFIXES, state_of
from stdit.data.scenes import ClipRules, scene_detector
from stdit.data.split import Source, Splitter
from stdit.data.workers import WorkerPool, num_workers
from stdit.files import check_writable, claimed, printable, read_json, write_json, write_text
from stdit.progress import Progress
from stdit.recipes.entry import command, command_parser
from stdit.warn import warn_user

_LISTED = 20  # videos named one by one


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Cut the videos that are not cut yet; exit code 1 if there is no clip."""
    args = _parser().parse_args(argv)
    for name, least in (("frames", 1), ("size", 16), ("timeout", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be >= {least}, got {value}.")
    for name in ("fps", "threshold"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} must be > 0, got {getattr(args, name)}.")
    scene_detector(args.threshold)  # raises before anything is written
    av.logging.set_level(None)
    output = Path(args.output)
    rules = ClipRules(args.frames, args.fps, args.threshold, args.still, black=args.black)
    sources = find_sources(args.videos, output)
    check_writable(output / "manifest.jsonl")
    with claimed([output / "manifest.jsonl"]):
        _begin(output, {**asdict(rules), "size": args.size})
        entries = _split(sources, output, Splitter(sources, output, rules, args.size), args)
    clips = sum(len(entry.get("rows", ())) for entry in entries)
    print(overview(entries, rules))
    if clips:
        manifest = output / "manifest.jsonl"
        print(
            f"{manifest}: train on them with data.root={output} data.manifest={manifest}; captions: stdit caption {manifest}"
        )
    return 0 if clips else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("split", __doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="videos, and folders of videos")
    parser.add_argument("--output", required=True, help="folder for the clips and manifest.jsonl")
    parser.add_argument("--frames", type=int, default=49, help="of every clip (default: %(default)s)")
    parser.add_argument("--fps", type=float, default=16.0, help="frames a second of the clips (default: %(default)g)")
    parser.add_argument(
        "--size", type=int, help="pixels of the shorter side, for videos that are larger (default: as they are)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=3.0,
        help="how many times as large as those around it a change is that counts as a cut (default: %(default)g)",
    )
    parser.add_argument(
        "--still",
        type=float,
        default=3.0,
        metavar="LEVELS",
        help="leave out clips in which no part changes by more of 255 levels; -1 keeps all (default: %(default)g)",
    )
    parser.add_argument(
        "--black",
        type=float,
        default=16.0,
        metavar="LEVELS",
        help="leave out clips in which no part is brighter; -1 keeps all (default: %(default)g)",
    )
    parser.add_argument("--workers", type=int, help="processes; 0: this one (default: by cores and videos)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds without progress for a video in a process"
    )
    return parser


def find_sources(paths: Sequence[Path], output: Path) -> list[Source]:
    """The videos of files and folders, in order; those of one folder with classes as folders get these as labels.

    ValueError for what is no video, an output among the videos, and two videos whose clips would have one name.
    """
    sources: list[Source] = []
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise ValueError(f"{str(path)!r} does not exist; give a video, or a folder of videos.")
            sources.append(Source(path, path.name))
            continue
        if output.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"--output {output} lies in {path} itself, so that clips would be cut again; put it elsewhere."
            )
        files, left_out = find_media(path, VIDEO_SUFFIXES)
        if left_out or not files:
            (warn_user if files else _refuse)(
                f"{str(path)!r} holds {len(files)} videos; {left_out or 'give another folder'}."
            )
        names = [file.relative_to(path) for file in files]
        are_classes = len(paths) == 1 and all(len(name.parts) > 1 for name in names)
        pairs = zip(files, names, strict=True)
        sources += [Source(file, name.as_posix(), name.parts[0] if are_classes else None) for file, name in pairs]
    first: dict[str, Source] = {}
    for source in sources:
        other = first.setdefault(source.prefix.casefold(), source)
        if other is not source:
            raise ValueError(
                f"the clips of {str(other.path)!r} and {str(source.path)!r} would have the same names; rename one, or give it "
                "another --output."
            )
    return sources


def _refuse(message: str) -> None:
    raise ValueError(message)


def _begin(output: Path, settings: dict[str, Any]) -> None:
    """Check that the folder is new or of the same settings, and note them; ValueError for another."""
    file = output / "settings.json"
    found, journal = read_json(file), output / "videos.jsonl"
    if found and found != settings and not _has_clips(output, journal):
        journal.unlink(missing_ok=True)  # of settings that gave no clip
        found = settings
    if found and found != settings:
        changed = ", ".join(f"{key}={found.get(key)}" for key in settings if found.get(key) != settings[key])
        raise ValueError(f"{output} has clips of other settings ({changed}); choose another --output, or give these.")
    others = [path.name for path in output.iterdir() if not path.name.startswith(".")]
    if not found and others:
        raise ValueError(f"{output} holds other files already ({others[0]!r}); choose an empty or new --output.")
    write_json(file, settings)


def _has_clips(output: Path, journal: Path) -> bool:
    """Whether there are clips, of videos with an entry or of one in which a call was stopped."""
    listed = any(entry.get("rows") for entry in _lines(journal))
    return listed or any(not path.name.startswith(".") for path in output.rglob("*.mp4"))


def _split(sources: list[Source], output: Path, splitter: Splitter, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cut the videos that have no entry in videos.jsonl -> the entries of all; manifest and entries grow with every video."""
    journal, manifest = output / "videos.jsonl", output / "manifest.jsonl"
    known = {entry["video"]: entry for entry in _lines(journal)}
    if not manifest.exists():  # it was removed: all clips that are there are listed again
        rows_before = (row for entry in known.values() for row in entry.get("rows", ()))
        every = [row for row in rows_before if (output / row["path"]).exists()]
        write_text(manifest, "".join(json.dumps(row) + "\n" for row in every))
    listed = {row["path"] for row in _lines(manifest)}
    for source in sources:
        entry = known.get(source.name)
        if entry is not None and "rows" in entry and (entry["bytes"], entry["modified"]) != state_of(source.path):
            raise ValueError(
                f"{str(source.path)!r} is not the video that {source.name!r} was when it was cut; rename it, or choose another "
                "--output."
            )

    def is_cut(entry: dict[str, Any]) -> bool:
        rows = [row["path"] for row in entry.get("rows", ())]
        return "rows" in entry and not any(path in listed and not (output / path).exists() for path in rows)

    # A video that could not be read is tried again: it may have been repaired.
    missing = [i for i, source in enumerate(sources) if not is_cut(known.get(source.name, {}))]
    if len(missing) < len(sources):
        print(f"{_number(len(sources) - len(missing), 'video')} cut before")
    workers = num_workers(args.workers, True) if args.workers is not None or len(missing) > 1 else 0
    workers = min(workers, len(missing))
    # Clips of an earlier cut that somebody took out of the manifest stay out when a clip beside them is cut again.
    left_out = {row["path"] for entry in known.values() for row in entry.get("rows", ())} - listed
    removed = {path for path in left_out if not (output / path).exists()}
    with open(journal, "a", encoding="utf-8") as entries, open(manifest, "a", encoding="utf-8") as rows:
        for entry in Progress(_entries(splitter, missing, workers, args.timeout), total=len(missing), unit="video"):
            known[entry["video"]] = entry
            for path in (row["path"] for row in entry.get("rows", ()) if row["path"] in removed):
                (output / path).unlink(missing_ok=True)
            new = [row for row in entry.get("rows", ()) if row["path"] not in listed | left_out]
            for stream, lines in ((rows, new), (entries, [entry])):  # a video without an entry is cut again
                stream.write("".join(json.dumps(line) + "\n" for line in lines))
                stream.flush()
    return [known[source.name] for source in sources]


def _entries(splitter: Splitter, keys: list[int], workers: int, timeout: float) -> Iterator[dict[str, Any]]:
    if not workers:
        yield from (splitter.load(key, {}, lambda name: None) for key in keys)
        return
    pool = WorkerPool(splitter, workers, timeout, {})
    with closing(pool.batches(iter([[key] for key in keys]))) as groups:
        for (entry,) in groups:
            yield entry


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was not written to its end is cut off.

    One that lacks only the end of its line, as editors leave it, gets that.
    """
    if not path.is_file():
        return []
    with open(path, "rb+") as stream:
        data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        if _is_object(data[len(whole) :]):
            stream.write(b"\n")
            whole = data
        else:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.decode().split("\n") if line.strip()]


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def overview(entries: Sequence[dict[str, Any]], rules: ClipRules) -> str:
    """How many scenes and clips there are, what was left out and why, and which videos were not read, as lines of text."""
    refused = [entry for entry in entries if "refused" in entry]
    clips = sum(len(entry.get("rows", ())) for entry in entries)
    length = f"{rules.frames} frames at {rules.fps:g} a second ({rules.seconds:.2f} s)"
    scenes = sum(entry.get("scenes", 0) for entry in entries)
    cut = [entry for entry in entries if "refused" not in entry]
    lines = [f"{_number(len(cut), 'video')}, {_number(scenes, 'scene')}: {_number(clips, 'clip')} of {length}"]
    whole = sum(entry["scenes"] == 1 for entry in cut)
    if whole:
        lines.append(
            f"  no cut was found in {_number(whole, 'video')}, taken as one scene (a lower --threshold finds more)"
        )
    left_out = sum((Counter(entry.get("left_out", {})) for entry in entries), Counter())
    longest = max((entry.get("longest", 0) for entry in entries), default=0)
    why = {
        "short": (
            "scene",
            f"shorter than a clip; the longest lasts {longest:.2f} s (use fewer --frames, or a higher --fps)",
        ),
        "black": (
            "clip",
            f"black: no part is brighter than {rules.black:g} of 255 levels (--black -1 keeps such clips)",
        ),
        "still": (
            "clip",
            f"still: no part changes by more than {rules.still:g} of 255 levels (--still -1 keeps such clips)",
        ),
    }
    lines += [f"  left out: {_number(left_out[k], noun)}, {text}" for k, (noun, text) in why.items() if left_out[k]]
    lines += [f"  not cut: {printable(entry['video'])!r} {printable(entry['refused'])}" for entry in refused[:_LISTED]]
    if len(refused) > _LISTED:
        lines.append(f"  not cut: {len(refused) - _LISTED} more; videos.jsonl has all of them")
    return "\n".join(lines)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"

"""Odd files for every reader: only the product's own errors come out, in one line, soon, and in little memory.

python tests/faults/fuzz.py --files 3000 --seed 0

A file is a whole one of its kind, changed: bytes flipped, cut, repeated, or put in; numbers and texts of its JSON, YAML
or header replaced by what no writer writes. A child process reads them, so that its peak of memory is that of the files.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from stdit.checkpoint.files import read_weights
from stdit.config import Config, load_typed
from stdit.data.config import DataConfig
from stdit.data.datasets import build_dataset
from stdit.data.idx import read_idx
from stdit.data.inputs import read_input
from stdit.data.manifest import read_manifest
from stdit.data.video_write import write_video
from stdit.diffusion.objective import ObjectiveConfig  # noqa: F401 (the config's parts are imported before memory is measured)
from stdit.model.stdit import STDiT
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import load_vae
from stdit.vae.tiny import TinyVAE

SECONDS, MEGABYTES = 5.0, 300  # the most that a file may take

# What a stranger writes where a number, a text or a list is expected.
ODD: list[Any] = [
    10**9, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), True, None, "", "\x1b]0;pwned\x07\x1b[31m", "../../../etc/passwd",
    "/etc/passwd", "a\0b", "\u2028", "\u202eevil", "x" * 100_000, [], {}, [[[[]]]], [10**9] * 3, {"a": {"b": 1}}, "${oc.env:HOME}", "!!python/object:os.system",
]  # fmt: skip
ODD_BYTES = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"\xef\xbb\xbf",
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b"\r\n",
    b"PK\5\6",
    b"}" * 100_000,
]


class Kind(NamedTuple):
    """A kind of file. make: writes a whole one; read: the reader of the product; files: the files that are changed."""

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]


def odd_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or put in."""
    changed = bytearray(data)
    place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 400) + 1)
    kind = rng.randrange(5)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + rng.choice(ODD_BYTES) + data[place:]
    if kind == 2:
        return data[:place] + rng.choice(ODD_BYTES)
    if kind == 3:
        return data[:place] + data[place : place + 100] * rng.choice((2, 50)) + data[place:]
    for _ in range(rng.choice((1, 3, 20))):
        changed[min(place + rng.randrange(64), len(data) - 1)] = rng.randrange(256)
    return bytes(changed)


def odd_values(value: Any, rng: random.Random) -> Any:
    """A JSON value with one part of it replaced, left out or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.15:
            return {**value, str(rng.choice(ODD)): value[key]}
        return {**value, key: odd_values(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], odd_values(value[place], rng), *value[place + 1 :]]
    return rng.choice(ODD)


def odd_file(path: Path, rng: random.Random) -> None:
    """Change a file in place, by its form where it has one and by its bytes."""
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(odd_values(json.loads(lines[place]), rng))
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif path.suffix == ".yaml" and rng.random() < 0.7:
        data = json.dumps(odd_values(json.loads(data), rng)).encode()  # JSON is YAML
    elif path.suffix == ".safetensors" and rng.random() < 0.6:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(odd_values(json.loads(data[8 : 8 + length]), rng)).encode()
        data = struct.pack("<Q", len(header)) + header + data[8 + length :]
    elif path.suffix == ".gz":
        data = gzip.compress(odd_bytes(gzip.decompress(data), rng)) if rng.random() < 0.6 else odd_bytes(data, rng)
    elif path.suffix == ".png" and rng.random() < 0.4:
        sizes = struct.pack(">II", *(rng.choice((1, 7, 4000, 65500, 2**31 - 1)) for _ in range(2)))
        head = b"IHDR" + sizes + data[24:29]
        data = data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]
    else:
        data = odd_bytes(data, rng)
    path.write_bytes(data)


def _pixels(frames: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, 32, 32, 3), np.uint8)


def _clip(folder: Path, name: str) -> None:
    write_video(folder / name, _pixels())


def _manifest(folder: Path, name: str) -> None:
    _clip(folder, "a.mp4")
    rows = [{"path": "a.mp4", "label": i % 2, "caption": f"a caption {i}"} for i in range(4)]
    if name.endswith(".jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (folder / name).write_text("path,label,caption\n" + "".join(f"a.mp4,{row['label']},text\n" for row in rows))


def _config(folder: Path) -> None:
    values = {
        "name": "t", "data": {"source": "shapes", "num_frames": 5, "height": 32, "width": 32, "sizes": []},
        "model": {"size": "S/2", "depth": 2, "hidden_size": 32, "num_heads": 2, "axes": ["joint"]},
        "train": {"steps": 6, "batch_size": 4, "lr": 1e-3}, "objective": {"mask_probs": {"shared": 1.0}},
    }  # fmt: skip
    (folder / "c.yaml").write_text(json.dumps(values))


def _tensors() -> dict[str, torch.Tensor]:
    return {"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2), "blocks.0.attn.qkv.weight": torch.zeros(24, 8)}


def _idx(folder: Path, name: str) -> None:
    data = struct.pack(">HBBIII", 0, 8, 3, 4, 8, 8) + bytes(256)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def _model() -> STDiT:
    return STDiT(depth=2, hidden_size=32, num_heads=2, num_classes=2, class_names=["a", "b"], sample_size=(2, 4, 4))


def _pipeline(folder: Path) -> None:
    vae = TinyVAE(16, [8, 8], [1, 1], [8, 8, 8], [1, 1, 1])
    STDiTPipeline(_model(), vae, STDiTScheduler(), num_frames=5, height=32, width=32).save_pretrained(folder / "m")


def _latents(folder: Path) -> None:
    (folder / "lat").mkdir()
    latents = torch.zeros(2, 16, 2, 4, 4)
    save_file({"latents": latents, "reencoded": latents.clone()}, folder / "lat" / "latents-00000.safetensors")
    shard = {
        "file": "latents-00000.safetensors",
        "count": 2,
        "labels": [0, 1],
        "captions": ["", "a"],
        "conditions": [{}, {}],
    }
    info = {
        "vae": "tiny", "vae_fingerprint": load_vae("tiny").fingerprint(), "num_classes": 2, "class_names": ["a", "b"], "num_frames": 5,
        "height": 32, "width": 32, "fps": None, "clips": 2, "shards": [shard],
    }  # fmt: skip
    (folder / "lat" / "cache.json").write_text(json.dumps(info))


def _read_latents(folder: Path) -> None:
    data = build_dataset(DataConfig(source="latents", root=str(folder / "lat"), num_frames=5, height=32, width=32))
    for index in range(min(len(data), 4)):
        data.record(index), data.load(index, np.random.default_rng(0))


def _lora(folder: Path) -> None:
    pairs = {f"blocks.0.attn.qkv.lora_{x}.weight": torch.zeros(size) for x, size in (("A", (4, 32)), ("B", (96, 4)))}
    save_file(pairs, folder / "l.safetensors")


def _input(name: str) -> Kind:
    return Kind(name, lambda d: _clip(d, name), lambda d: read_input(d / name, (32, 32), 8.0), (name,))


def _picture(name: str) -> Kind:
    return Kind(name, lambda d: Image.fromarray(_pixels()[0]).save(d / name), _input(name).read, (name,))


_MODEL_FILES = (
    "m/model_index.json", "m/transformer/config.json", "m/vae/config.json", "m/scheduler/scheduler_config.json",
    "m/transformer/diffusion_pytorch_model.safetensors", "m/vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
KINDS = [
    _input("a.mp4"), _input("a.gif"), _picture("p.png"), _picture("p.jpg"), _picture("p.webp"), _picture("p.bmp"),
    *(
        Kind(name, lambda d, name=name: _manifest(d, name), lambda d, name=name: read_manifest(d / name), (name,))
        for name in ("m.jsonl", "m.csv")
    ),
    Kind("config", _config, lambda d: load_typed(Config, d / "c.yaml"), ("c.yaml",)),
    Kind("safetensors", lambda d: save_file(_tensors(), d / "w.safetensors"), lambda d: read_weights(d / "w.safetensors"), ("w.safetensors",)),
    Kind("torch", lambda d: torch.save(_tensors(), d / "w.pt"), lambda d: read_weights(d / "w.pt"), ("w.pt",)),
    *(
        Kind(name, lambda d, name=name: _idx(d, name), lambda d, name=name: read_idx(d / name), (name,))
        for name in ("x-images-idx3-ubyte", "x-images-idx3-ubyte.gz")
    ),
    Kind("model", _pipeline, lambda d: STDiTPipeline.from_pretrained(str(d / "m")), _MODEL_FILES),
    Kind("latents", _latents, _read_latents, ("lat/cache.json", "lat/latents-00000.safetensors")),
    Kind("lora", _lora, lambda d: _model().load_lora_adapter(d, weight_name="l.safetensors"), ("l.safetensors",)),
]  # fmt: skip


def fault(read: Callable[[Path], object], folder: Path) -> str | None:
    """What is wrong with how a file was read, or None: it was read, or refused in one line."""
    began, said = time.perf_counter(), None
    try:
        read(folder)
    except (ValueError, OSError) as error:
        if type(error).__name__ in ("JSONDecodeError", "UnicodeDecodeError", "UnicodeEncodeError"):
            said = f"a bare {type(error).__name__}: {error}"
        elif "\n" in str(error).strip():  # other separators are escaped where it is printed
            said = f"more than one line: {error!r}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} at {where.filename}:{where.lineno}: {str(error)[:100]}"
    seconds = time.perf_counter() - began
    return f"{seconds:.1f} s" if seconds > SECONDS else said


def fuzz(kinds: list[Kind], files: int, seed: int, folder: Path, results: Any) -> None:
    """Read `files` odd files; puts the faults and the peak of memory (MB) above that of the whole files in `results`."""
    silence()
    wholes = []
    for number, kind in enumerate(kinds):
        whole = folder / f"whole-{number}"
        whole.mkdir()
        kind.make(whole)
        kind.read(whole)
        wholes.append(whole)
    before, faults = _peak(), []
    for i in range(files):
        rng, kind = random.Random(seed * 1_000_003 + i), kinds[i % len(kinds)]
        odd = folder / "odd"
        shutil.copytree(wholes[i % len(kinds)], odd)
        for file in rng.sample(kind.files, k=1 + (rng.random() < 0.1 and len(kind.files) > 1)):
            odd_file(odd / file, rng)
        said, after = fault(kind.read, odd), _peak()
        if after - before > MEGABYTES:
            said, before = f"{after - before} MB more ({said})", after
        if said is not None:
            faults.append((kind.name, i, said))
        shutil.rmtree(odd)
    results.put(faults)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def silence() -> None:
    """No warnings and no words of libraries, which odd files provoke by the thousand."""
    warnings.simplefilter("ignore")
    av.logging.set_level(None)
    os.environ["DIFFUSERS_VERBOSITY"] = "critical"
    import diffusers

    diffusers.utils.logging.set_verbosity(50)
    diffusers.utils.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> int:
    """Read odd files in a child process; exit code 1 and a list if any is read otherwise than it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only the kinds whose name has this part")
    args = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if (args.kind or "") in kind.name]
    context = multiprocessing.get_context("fork")  # the child shares the imports
    results, began = context.Queue(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        child = context.Process(target=fuzz, args=(kinds, args.files, args.seed, Path(folder), results))
        child.start()
        child.join(60 + args.files)
        if child.exitcode != 0:
            child.kill()
            print(f"the reading process {'hangs' if child.exitcode is None else f'ended with {child.exitcode}'}")
            return 1
        faults = results.get()
    for kind, number, said in faults[:40]:
        print(f"{kind}, file {number}: {ascii(said)[1:-1][:260]}")
    print(
        f"{args.files} files, {time.perf_counter() - began:.0f} s, {len(faults)} faults {dict(Counter(f[0] for f in faults))}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

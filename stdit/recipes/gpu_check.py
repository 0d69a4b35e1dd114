"""Check on this machine what needs a GPU, and measure it. The same command goes on where it stopped.

stdit gpu-check                      everything, in at most 25 minutes
stdit gpu-check --section core       numbers against the CPU, kernels, exact resume, shards (FSDP2), packing, Muon
stdit gpu-check --section compile    blocks as one graph each, runs with them, the speed of XL/2
stdit gpu-check --section long       utilisation for images and long clips, growth with frames, memory, --fit
stdit gpu-check --section peers      DiT, Latte and diffusers beside stdit; their sources lie in --peers
stdit gpu-check --device cpu         the same with tiny models: whether all checks run

A line for each check; results are kept in --output, and what passed is not done again unless the code, the device or torch
changes. A section ends when its time is over. The exit code is 1 if a check fails or is left for another call.
"""

import faulthandler
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import stdit
from stdit.data.identity import hash_of
from stdit.files import printable, read_json, write_json
from stdit.hashes import file_sha256
from stdit.recipes import gpu_compile, gpu_core, gpu_long
from stdit.recipes.bench_peers import RACES, run_race
from stdit.recipes.entry import command, command_parser
from stdit.recipes.machine import Machine
from stdit.recipes.peer_sources import check_sources

Check = Callable[[Machine], str]
# Minutes that a section may take, 25 in all.
MINUTES = {"core": 6, "compile": 5, "long": 6, "peers": 8}
_RESULTS = {"passed", "failed", "begun"}


def checks_of(section: str, peers: Path) -> dict[str, Check]:
    """The checks of a section by name."""
    if section == "peers":
        return {race.name: partial(_race, race, sources=peers) for race in RACES}
    listed = {"core": gpu_core.CHECKS, "compile": gpu_compile.CHECKS, "long": gpu_long.CHECKS}[section]
    return {check.__name__.replace("_", " "): check for check in listed}


def _race(race: Any, machine: Machine, *, sources: Path) -> str:
    return run_race(race, machine, sources)


class Results:
    """What checks have found on a machine, in a file that a later call reads. path: of the file; again: sections without theirs."""

    def __init__(self, path: Path, machine: Machine, *, again: Sequence[str] = ()):
        self.path = path
        self._of = {"device": machine.name, "torch": torch.__version__, "full": machine.full, "code": code_hash()}
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            kept = self._read()
            checks = kept["checks"] if kept["of"] == self._of else {}
            self.found = {key: one for key, one in checks.items() if key.split(": ")[0] not in again}

    def _read(self) -> dict[str, Any]:
        try:
            kept = read_json(self.path)
            if kept["of"].keys() == self._of.keys() and all(
                one["result"] in _RESULTS for one in kept["checks"].values()
            ):
                return kept
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged; remove it, or give another --output.") from error
        raise ValueError(f"{self.path} holds no results of these checks; give another --output.")

    def put(self, name: str, result: str, said: str = "", seconds: float = 0.0) -> None:
        """Keep the result of a check at once."""
        self.found[name] = {"result": result, "said": said, "seconds": round(seconds, 2)}
        self._write()

    def drop(self, name: str) -> None:
        """Forget the result of a check at once."""
        del self.found[name]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"of": self._of, "checks": self.found})


def code_hash() -> str:
    """A hash of the code of this package."""
    return hash_of([file_sha256(path) for path in sorted(Path(stdit.__file__).parent.rglob("*.py"))])


def run_section(
    section: str, checks: Mapping[str, Check], machine: Machine, results: Results, *, minutes: float
) -> list[str]:
    """Run the checks of a section that have not passed; returns the names of those that failed or are left.

    Whatever is not done when the time is over ends the process, whose results are on disk.
    """
    deadline, missing = time.monotonic() + 60 * minutes, []
    faulthandler.dump_traceback_later(60 * minutes + 30, exit=True, file=2)
    try:
        for name, check in checks.items():
            key = f"{section}: {name}"
            before = results.found.get(key, {})
            if before.get("result") == "passed":
                print(f"ok    {key}: {before['said']} (before)", flush=True)
                continue
            if before.get("result") == "begun" and before["seconds"] > 30 * minutes:
                print(f"FAIL  {key}: it ended the command the last time (--again tries it again)", flush=True)
                missing.append(key)
                continue
            if time.monotonic() > deadline - 0.1 * 60 * minutes:
                missing.append(key)
                print(
                    f"left  {key}: the {minutes:g} minutes of this section are over; run the command again", flush=True
                )
                continue
            if not _passes(key, check, machine, results, left=deadline - time.monotonic()):
                missing.append(key)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return missing


def _passes(key: str, check: Check, machine: Machine, results: Results, *, left: float) -> bool:
    """Run one check, print and keep its result. left: the seconds that it may take, kept while it runs."""
    results.put(key, "begun", seconds=left)
    began = time.monotonic()
    try:
        said, passed = check(machine), True
    except KeyboardInterrupt:
        results.drop(key)
        raise
    except Exception as error:
        said, passed = printable(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"), False
    seconds = time.monotonic() - began
    results.put(key, "passed" if passed else "failed", said, seconds)
    print(f"{'ok   ' if passed else 'FAIL '} {key}: {said} ({seconds:.1f} s)", flush=True)
    machine.clear()
    return passed


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if any fails or is left, and 2 without the device."""
    parser = command_parser("gpu-check", __doc__)
    parser.add_argument("--section", choices=MINUTES, help="default: all, one after another")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu runs all checks with tiny models"
    )
    parser.add_argument(
        "--peers", type=Path, default=Path("peers"), help="folder with the sources of DiT, Latte and timm"
    )
    parser.add_argument("--output", type=Path, default=Path("output/gpu_check.json"), help="file of results")
    own = ", ".join(f"{name} {minutes}" for name, minutes in MINUTES.items())
    parser.add_argument("--minutes", type=float, help=f"that a section may take (default: {own})")
    parser.add_argument("--again", action="store_true", help="do what has passed in these sections again, too")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("this machine has no CUDA device; run the command on a machine with one, or with --device cpu.")
        return 2
    if args.minutes is not None and not 0 < args.minutes < 1000:
        raise ValueError(f"--minutes must be > 0 and < 1000, got {args.minutes}.")
    sections = [args.section] if args.section else list(MINUTES)
    if "peers" in sections:
        check_sources(args.peers)  # before anything is run
    machine = Machine(device, full=device.type == "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{machine.name}, torch {torch.__version__}")
    results = Results(args.output, machine, again=sections if args.again else ())
    missing: list[str] = []
    for section in sections:
        minutes = args.minutes or MINUTES[section]
        missing += run_section(section, checks_of(section, args.peers), machine, results, minutes=minutes)
    print(f"{len(missing)} checks failed or are left" if missing else "all checks passed")
    return 1 if missing else 0

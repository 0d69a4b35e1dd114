"""Rules for the whole package: imports, signatures, names, safety, configs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stdit.conditions.base import Conditioner
from stdit.config import Config, load_typed
from stdit.data.backends import LibraryReader
from stdit.model.trunks.base import Trunk
from stdit.sampling.solvers import Solver
from stdit.training.fit import TrainingLoop
from stdit.training.vae import VAEConfig
from stdit.vae import VideoVAE

ROOT = Path(__file__).resolve().parents[1]
RANKS = {
    "rng": 0, "variants": 0, "precision": 0, "hub": 0, "pixels": 0, "files": 0, "weights": 1, "warn": 0, "ranges": 0, "hashes": 0, "progress": 0, "typed_config": 2, "legacy": 1, "labels": 1, "nn": 1, "diffusion": 1,
    "text": 2, "conditions": 3, "data": 4, "model": 4, "vae": 4, "checkpoint": 5, "sampling": 5, "worlds": 5, "web": 7, "training": 6, "evaluation": 6,
    "config": 7, "recipes": 8, "__main__": 9,
}  # fmt: skip
FILES = sorted((ROOT / "stdit").rglob("*.py"))


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent != ROOT / "stdit" or p.stem != "__init__"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_modules_import_from_lower_ranks_only(path):
    package = path.relative_to(ROOT / "stdit").parts[0].removesuffix(".py")
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "stdit" and len(parts) > 1 and parts[1] != package:
            assert RANKS[parts[1]] < RANKS[package], f"{path.name} imports {module}"


def package_calls():
    """Yield (file, call) for every call in the package."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node


def edges() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, also in functions and under TYPE_CHECKING."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stdit"):
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    found[name].add(inside if inside in names else node.module)
    return found


def test_no_imports_are_circular():
    """Imports under TYPE_CHECKING count; package __init__ files that load on demand do not."""
    lazy = {"stdit", "stdit.data"}
    graph = {name: {to for to in targets if to not in lazy} for name, targets in edges().items() if name not in lazy}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            visit(target, (*path, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_call_has_more_than_four_positional_arguments():
    varying = set(
        [
            "max",
            "min",
            "zip",
            "print",
            "set",
            "range",
            "isinstance",
            "Path",
            "cat",
            "keyed_rng",
            "zeros",
            "expand",
            "view",
        ]
    )
    many = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call.func)}"
        for path, call in package_calls()
        if len([a for a in call.args if not isinstance(a, ast.Starred)]) > 4
        and ast.unparse(call.func).rsplit(".")[-1] not in varying
    ]
    assert many == []


# Public configurations that are saved as flat JSON, so that their constructors have many parameters.
FLAT = {"STDiT", "UNet", "STDiTPipeline", "STDiTScheduler"}


def test_no_constructor_has_more_than_ten_parameters():
    large = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or node.name in FLAT:
                continue
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    arguments = item.args
                    count = len(arguments.args) + len(arguments.kwonlyargs) - 1
                    if count > 10:
                        large.append(f"{path.relative_to(ROOT)}: {node.name} has {count}")
    assert large == []


# Words of version 0.1.0's names that are no standard terms of the field.
FORMER_WORDS = {
    "told", "seen", "kept", "places", "spots", "todo", "partly", "wiring", "way", "taught", "nearer", "turns", "unmodulated",
    "sockets", "skipping", "shown", "silent", "behind", "settled", "surround", "foreign", "forgotten", "blind", "restarted",
    "restarts", "obeyed", "verdict", "outcome", "beside", "claim", "dear", "crowd", "crowded", "mixture", "shares", "scheme",
    "schemes", "looking", "resting", "judge", "slope", "coordinates",
}  # fmt: skip


def public_names(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef):
                        yield item.name
                        if item.name == "__init__" or not item.name.startswith("_"):
                            yield from (a.arg for a in (*item.args.args, *item.args.kwonlyargs))
                    elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        yield item.target.id
            else:
                yield from (a.arg for a in (*node.args.args, *node.args.kwonlyargs))
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_no_public_name_has_a_nonstandard_word_of_version_0_1():
    found = []
    for path in FILES:
        if path.stem == "legacy":
            continue
        for name in [path.stem, *public_names(path)]:
            words = set(re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower()))
            if not name.startswith("_") and words & FORMER_WORDS:
                found.append(f"{path.relative_to(ROOT)}: {name}")
    assert found == []


def test_configs_and_options_import_no_heavy_library():
    modules = [
        "stdit.config", "stdit.data.config", "stdit.diffusion.config", "stdit.model.config", "stdit.training.config",
        "stdit.checkpoint.config", "stdit.sampling.options", "stdit.nn.config",
    ]  # fmt: skip
    heavy = ("torch", "diffusers", "accelerate", "transformers", "av")
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_stdit_is_light():
    heavy = ("transformers", "decord", "torchcodec", "flash_attn", "torchvision")
    code = f"import sys, stdit; print([m for m in {heavy} if m in sys.modules], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_no_module_unpickles_or_runs_a_shell():
    forbidden = (
        "pickle.load",
        "weights_only=False",
        "shell=True",
        "os.system",
        "trust_remote_code=True",
        "eval(",
        "exec(",
    )
    for path in [*FILES, *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                text = ast.unparse(node).replace(" ", "")
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads"), f"{path}: {text[:80]}"
                assert not any(word in text for word in forbidden[1:3]), f"{path}: {text[:80]}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_loads_and_begins_with_its_purpose_and_command(path):
    config = load_typed(VAEConfig if path.stem.startswith("vae_") else Config, path)
    assert config.name == path.stem
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("#   ")


def test_git_ignores_the_users_folders_and_not_the_code():
    for name, ignored in (
        ("data/clip.mp4", True),
        ("models/x/config.json", True),
        ("stdit/data/loader.py", False),
        ("data/README.md", False),
    ):
        code = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode
        if code not in (0, 1):
            pytest.skip("this is not a git checkout")
        assert (code == 0) == ignored, name


@pytest.mark.parametrize("interface", [LibraryReader, TrainingLoop, Trunk, Conditioner, Solver, VideoVAE])
def test_an_interface_is_abstract(interface):
    with pytest.raises(TypeError, match="abstract"):
        interface()

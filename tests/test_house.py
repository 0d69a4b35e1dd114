"""Four tests that watch the whole house."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from stdit.config import Config, load_typed
from stdit.training.vae import VAEConfig

ROOT = Path(__file__).resolve().parents[1]
RANKS = {
    "rng": 0, "variants": 0, "precision": 0, "hub": 0, "pixels": 0, "files": 0, "legacy": 0, "warn": 0, "prompt": 0, "nn": 1, "diffusion": 1,
    "text": 2, "conditions": 3, "data": 4, "model": 4, "vae": 4, "checkpoint": 5, "sampling": 5, "training": 6, "evaluation": 6,
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
def test_imports_only_go_down(path):
    room = path.relative_to(ROOT / "stdit").parts[0].removesuffix(".py")
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "stdit" and len(parts) > 1 and parts[1] != room:
            assert RANKS[parts[1]] < RANKS[room], f"{path.name} imports {module}"


def test_import_stdit_is_light():
    heavy = ("transformers", "decord", "torchcodec", "flash_attn", "torchvision")
    code = f"import sys, stdit; print([m for m in {heavy} if m in sys.modules], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_nothing_unpickles_or_runs_a_shell():
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
def test_every_config_loads_and_says_what_and_how(path):
    config = load_typed(VAEConfig if path.stem.startswith("vae_") else Config, path)
    assert config.name == path.stem
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("#   ")


def test_the_users_folders_are_ignored_and_the_code_is_not():
    for name, ignored in (
        ("data/clip.mp4", True),
        ("models/x/config.json", True),
        ("stdit/data/loader.py", False),
        ("data/README.md", False),
    ):
        code = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode
        if code not in (0, 1):
            pytest.skip("this is no git checkout")
        assert (code == 0) == ignored, name

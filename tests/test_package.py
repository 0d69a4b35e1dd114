"""The `stdit` command, the scripts in tools/, and the contents of the wheel."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stdit.config import config_folder, find_config
from stdit.recipes import cli, entry

ROOT = Path(__file__).resolve().parents[1]
SHIMS = sorted((ROOT / "tools").glob("*.py"))
RENAMED = {"sample_video": "sample", "convert_checkpoint": "convert"}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from stdit.recipes.cli import main; main(['--help']);"
        "heavy = {'torch', 'diffusers', 'accelerate', 'numpy', 'av', 'omegaconf', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == "[]\n"
    assert all(command in done.stdout for command in cli.COMMANDS)


def needs(names: list[str], without: set[str]) -> set[str]:
    """Packages and what they need in turn, as installed, by their names in lower case."""
    found: set[str] = set()
    left = [re.sub(r"[-_.]+", "-", name).lower() for name in names]
    while left:
        name = left.pop()
        if name in found | without:
            continue
        try:
            given = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        left += [
            re.sub(r"[-_.]+", "-", one.name).lower()
            for one in given
            if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return found


def test_what_a_machine_with_torch_needs_besides_is_in_one_file():
    pins = {}
    for name in ("device", "cuda"):
        lines = [line for line in (ROOT / f"constraints/{name}.txt").read_text().splitlines() if line[0] != "#"]
        pins[name] = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1] for line in lines}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = [Requirement(text).name for text in declared]
    carried = needs([name for name in names if name != "torch"] + ["pytest"], without=needs(["torch"], set()))
    assert carried <= set(pins["device"]) and "torch" not in pins["device"]
    assert pins["device"].items() <= pins["cuda"].items()


def test_every_recipe_is_a_command_with_a_help_text(capsys):
    recipes = {path.stem for path in (ROOT / "stdit/recipes").glob("*.py")}
    assert {name.replace("-", "_") for name in cli.COMMANDS} == recipes - {
        "__init__",
        "cli",
        "adapters",
        "against",
        "entry",
        "bench_data",
        "bench_peers",
        "bench_scale",
        "bench_windows",
        "gpu_compile",
        "gpu_core",
        "gpu_long",
        "gpu_models",
        "gpu_speed",
        "machine",
        "peer_models",
        "peer_sources",
        "train_arguments",
        "budget",
        "build",
        "encoding",
        "latent_shards",
        "shard_folder",
        "starts",
        "propose",
        "sample_tasks",
        "sampling",
        "models",
        "order",
        "planned",
        "planned_steps",
        "outputs",
        "previews",
    }
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert f"usage: stdit {command}" in capsys.readouterr().out


def test_the_help_of_every_command_is_that_of_its_parser():
    spec = importlib.util.spec_from_file_location("make_help", ROOT / "dev/make_help.py")
    make_help = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_help)
    stale = [
        name
        for name in cli.COMMANDS
        if (cli.HELP / f"{name}.txt").read_text(encoding="utf-8") != make_help.help_of(name)
    ]
    assert stale == [], "run: python dev/make_help.py"


def test_help_loads_neither_torch_nor_diffusers():
    script = "import sys; from stdit.recipes.cli import main; main(['sample', '--help']); print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "name a config"),
        (["--data", "nowhere"], "does not exist"),
        (["--data", "empty"], "holds no files; give a folder of videos or pictures"),
        (["video", "--minutes", "3"], "--minutes belongs to --data"),
    ],
)
def test_arguments_of_train_that_cannot_be_are_told_before_torch_is_loaded(tmp_path, given, message):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    code = f"import sys; from stdit.recipes.cli import main; code = main({['train', *given]!r}); sys.exit(code + 10 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_command_names_the_nearest_and_the_version_is_printed(capsys):
    assert cli.main(["smaple"]) == 2
    assert "Did you mean 'sample'?" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("stdit 0.")
    assert cli.main(["make_shapes", "--num-clips", "0"]) == 1  # a module's name is accepted, too
    assert "--num-clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "a/b"), "'a/b': No space left on device; free some room"),
        (OSError(28, "No space left on device"), "No space left on device; free some room"),
        (OSError(30, "Read-only file system", "a"), "'a': Read-only file system; make it writable"),
        (FileNotFoundError(2, "No such file", "a"), "'a': No such file; check the path."),
    ],
)
def test_what_the_system_refuses_is_said_with_a_remedy(error, said, capsys):
    def main(argv):
        raise error

    assert entry.run(main) == 1
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("error", [ValueError("a value"), None])
def test_errors_that_a_user_can_cause_end_in_one_line(error, capsys):
    import torch

    raised = error or torch.OutOfMemoryError("CUDA out of memory.\nmore lines")

    def main(argv):
        raise raised

    assert entry.run(main) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert (str(raised) if error else "fewer frames, a smaller size") in lines[0]
    raised = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        entry.run(main)


def test_a_reader_that_closes_early_causes_no_traceback():
    for arguments in (["--help"], ["make-shapes", "--help"]):
        command = [sys.executable, "-m", "stdit", *arguments]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        os.close(write)
        assert done.stderr == ""


def test_a_warning_is_one_line_without_the_line_of_code(capsys):
    def main(argv):
        warnings.warn("a reason", stacklevel=1)
        return 0

    with warnings.catch_warnings():  # without pytest's recording, as on a command line
        warnings.simplefilter("always")
        warnings.showwarning = lambda *message: sys.stderr.write(warnings.formatwarning(*message[:4]))
        assert entry.run(main) == 0
    assert capsys.readouterr().err == "warning: a reason\n"


@pytest.mark.parametrize("path", SHIMS, ids=lambda path: path.stem)
def test_a_tool_is_the_recipe_under_its_former_name(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    recipe = importlib.import_module(f"stdit.recipes.{RENAMED.get(path.stem, path.stem)}")
    try:
        assert importlib.import_module(path.stem) is recipe
    finally:
        sys.modules.pop(path.stem, None)
    assert len(path.read_text().splitlines()) < 15


def test_a_tool_runs_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tools/make_shapes.py"), "--num-clips", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert done.returncode == 1
    assert "--num-clips" in done.stderr and "Traceback" not in done.stderr


def test_a_config_is_found_by_path_or_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert find_config(name) == config_folder() / "quickstart.yaml"
    assert find_config("conditioning", "compare") == config_folder() / "compare" / "conditioning.yaml"
    assert find_config("configs/compare/base.yaml") == config_folder() / "compare" / "base.yaml"
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").touch()
    assert find_config("configs/quickstart.yaml") == Path("configs/quickstart.yaml")  # a path comes first
    for name in ("none", "../pyproject", "compare/../../setup"):
        with pytest.raises(ValueError, match=r"does not exist; there are: configs/quickstart.yaml; by name: bounce, "):
            find_config(name)


def test_the_wheel_has_configs_types_weights_and_the_command(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed (it is in stdit[dev])")
    built = next(wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
        entries = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "stdit = stdit.recipes.cli:main" in entries
    assert {"stdit/py.typed", "stdit/recipes/train.py", "stdit/vae/weights/config.json"} <= names
    configs = {f"stdit/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names
    assert not any(name.startswith(("tools/", "tests/")) for name in names)


def test_the_sdist_has_what_a_checkout_needs(tmp_path):
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed (it is in stdit[dev])")
    built = next(sdist.SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"mkdocs.yml", "dev/make_config_reference.py", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"} <= names
    assert {"Makefile", "tools/train.py", "configs/quickstart.yaml", "tests/test_package.py", "docs/index.md"} <= names

"""The documentation agrees with the code, as far as tests can check: config keys, links, commands and flags."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from stdit.config import Config
from stdit.data.config import DataConfig
from stdit.diffusion.masks import MASK_STRATEGIES
from stdit.evaluation.compare import Comparison
from stdit.model.config import ModelConfig
from stdit.model.trunks import TRUNKS
from stdit.nn.conditioning import CONDITIONINGS
from stdit.recipes.cli import ARGUMENTS, COMMANDS
from stdit.sampling.options import SamplingOptions
from stdit.training.vae import VAEConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LOG = ROOT / "dev" / "LOG.md"
# Recipes that take `key=value` of a run's config.
CONFIGURED = ("train", "cache_latents", "plan")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_config_reference", ROOT / "dev" / "make_config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_reference_is_what_the_dataclasses_say(reference):
    written = (ROOT / "docs" / "config.md").read_text()
    assert written == reference.page(), "run: python dev/make_config_reference.py"


def test_every_config_key_has_a_meaning(reference):
    for schema in (Config, VAEConfig, Comparison):
        rows = list(reference.config_keys(schema))
        assert [key for key, _, _, meaning in rows if not meaning] == []
        assert [key for key, _, _, meaning in rows if "|" in meaning] == []  # which would end a cell of the table


def test_the_values_of_the_reference_are_those_of_the_code(reference):
    hints = {kind: kind.__dataclass_fields__ for kind in (DataConfig, ModelConfig)}
    values = {
        "data.source": get_args(hints[DataConfig]["source"].type),
        "model.position_encoding": get_args(hints[ModelConfig]["position_encoding"].type),
        "model.pos_scaling": get_args(hints[ModelConfig]["pos_scaling"].type),
        "model.trunk": TRUNKS,
        "model.conditioning": CONDITIONINGS,
        "objective.mask_strategy": [*MASK_STRATEGIES, "mixed"],
    }
    for key, names in values.items():
        assert set(reference.CHOICES[key]) == set(names), key


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=name_of)
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
    broken = [
        link
        for link in links
        if "://" not in link and not link.startswith("#") and not (page.parent / link.split("#")[0]).exists()
    ]
    assert broken == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_the_api_reference_names_what_exists():
    for name in re.findall(r"^::: stdit\.([\w.]+)", (ROOT / "docs" / "api.md").read_text(), flags=re.M):
        module = ROOT / "stdit" / f"{name.replace('.', '/')}.py"
        if not module.is_file():
            parent, _, item = name.rpartition(".")
            source = (ROOT / "stdit" / f"{parent.replace('.', '/')}.py").read_text()
            assert re.search(rf"^(?:class|def) {item}\b", source, flags=re.M), name


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(recipe, arguments) of every command that a page shows."""
    text = page.read_text().replace("\\\n", " ")
    fence = r"^```(\w*)\n(.*?)^```"
    blocks = [block for language, block in re.findall(fence, text, flags=re.S | re.M) if not language]
    rest = re.sub(fence, "", text, flags=re.S | re.M)
    for line in [*(line for block in blocks for line in block.splitlines()), *re.findall(r"`([^`\n]+)`", rest)]:
        found = re.search(r"(?:^|[ /])tools/(\w+)\.py\b(.*)|^stdit ([a-z][\w-]*)(.*)", line)
        if found is None:
            continue
        tool, arguments, command, of_command = found.groups()
        if tool:
            shim = ROOT / "tools" / f"{tool}.py"
            assert shim.is_file(), f"{line}: there is no {shim.name}"
            recipe = re.search(r"from stdit\.recipes import (\w+)", shim.read_text())[1]
        else:
            assert command in COMMANDS, f"{line}: there is no command {command}"
            recipe, arguments = command.replace("-", "_"), of_command
        yield recipe, shlex.split(arguments.split("&&")[0], comments=True)


def flags_of(recipe: str) -> set[str]:
    modules = [recipe, *([ARGUMENTS[recipe]] if recipe in ARGUMENTS else [])]
    source = "".join((ROOT / "stdit" / "recipes" / f"{module}.py").read_text() for module in modules)
    found = set(re.findall(r"\"(--[\w-]+)\"", source)) | {"--help"}
    if "add_flags" in source:
        found |= {one.metadata["flag"] for one in SamplingOptions.__dataclass_fields__.values()}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_existing_tools_flags_configs_and_keys(page, reference):
    keys = {key for key, *_ in reference.config_keys()}
    for recipe, arguments in commands(page):
        if recipe == "evaluate" and "--world" in arguments:  # the same as evaluate-world
            recipe, arguments = "evaluate_world", [one for one in arguments if one != "--world"]
        shown = f"{recipe} {' '.join(arguments)}"
        for argument in arguments:
            flag = argument.split("=")[0]
            if flag.startswith("--"):
                assert flag in flags_of(recipe), f"{shown}: {recipe} has no {flag}"
            elif re.fullmatch(r"configs/[\w/]+\.yaml", argument):
                assert (ROOT / argument).is_file() or "NAME" in argument, f"{shown}: no {argument}"
            elif recipe in CONFIGURED and re.match(r"[a-z_]+(\.[a-z_]+)*=", argument):
                assert flag in keys or flag.rpartition(".")[0] in keys, f"{shown}: no key {flag}"
            elif recipe == "train_vae" and "=" in argument:
                assert flag in {key for key, *_ in reference.config_keys(VAEConfig)}, f"{shown}: no key {flag}"


def test_keys_in_prose_exist(reference):
    keys = {key for key, *_ in reference.config_keys()}
    sections = {key.split(".")[0] for key in keys if "." in key}
    for page in (page for page in PAGES if page.name not in ("CHANGELOG.md", "config.md")):
        for key in re.findall(r"`((?:" + "|".join(sections) + r")\.[a-z_]+)(?:=[^`]*)?`", page.read_text()):
            assert key in keys or key.endswith(".py"), f"{name_of(page)}: {key}"


def test_only_the_log_has_dates_commits_and_local_paths():
    words = r"\b(today|until then|so far|commit [0-9a-f]{7,}|beside other work|by a script)\b|\.\./shared"
    found = [
        (name_of(page), re.search(words, page.read_text())[0]) for page in PAGES if re.search(words, page.read_text())
    ]
    configs = [p.name for p in (ROOT / "configs").rglob("*.yaml") if "../shared" in p.read_text()]
    assert found == [] and configs == []

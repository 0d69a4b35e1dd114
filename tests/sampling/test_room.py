"""The package stdit.sampling: no circular imports, and warnings that point at the caller."""

import ast
import warnings
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from conftest import fill

import stdit.sampling
from stdit.sampling import tasks
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.sampling.windowed import WindowedSampler
from stdit.vae import TinyVAE

ROOM = Path(stdit.sampling.__file__).parent
FAST = {"num_inference_steps": 1, "progress": False, "precision": "fp32"}


def imported(path: Path) -> set[str]:
    """The files of the package that a file imports, also in functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stdit.sampling"):
            rest = node.module.split(".")[2:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found


def test_no_circle_of_imports_and_the_engine_knows_no_pipeline():
    graph = {path.stem: imported(path) for path in ROOM.glob("*.py")}
    TopologicalSorter(graph).prepare()  # CycleError if there is a circle
    assert not any("pipeline" in names for names in graph.values())
    assert not graph["engine"] & {"windowed", "autoregressive", "checks"}
    assert {"windowed", "autoregressive"}.isdisjoint(graph["windowed"] | graph["autoregressive"] | graph["checks"])


def test_no_warning_counts_stack_levels():
    for path in ROOM.glob("*.py"):
        assert "stacklevel" not in path.read_text(), path


@pytest.fixture
def pipe(tiny_model):
    model = tiny_model(in_channels=16, num_classes=3, learn_sigma=False)
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    return STDiTPipeline(model, vae, STDiTScheduler("flow"), 9, 32, 32, 8.0, "flow", mask_strategies=["shared"])


@pytest.mark.parametrize(
    "call",
    [
        lambda p, clip: p.fill(tasks.extend(clip, 4, 0, p.video_vae), 0, **FAST),
        lambda p, clip: p.extend(clip, after=4, class_labels=0, **FAST),
        lambda p, clip: p(0, 5, history_guidance=2.0, **FAST),
    ],
    ids=["fill", "extend", "call"],
)
def test_warnings_point_at_the_line_of_the_caller(pipe, call):
    clip = torch.zeros(1, 3, 5, 32, 32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(pipe, clip)
    assert [(one.filename, one.lineno) for one in caught] == [(__file__, call.__code__.co_firstlineno)]


def test_the_old_names_of_the_sampler_are_the_current_class(pipe, monkeypatch):
    import stdit.sampling.sampler as old

    assert old.Sampler is WindowedSampler
    monkeypatch.setattr(old.Sampler, "fill", lambda *a: (_ for _ in ()).throw(RuntimeError("called")))
    with pytest.raises(RuntimeError, match="called"):
        pipe(0, **FAST)

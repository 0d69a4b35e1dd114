import json
from pathlib import Path

import pytest

from stdit.config import Config, TextChoice, load_typed
from stdit.data.config import DataConfig
from stdit.data.datasets import MovingShapes
from stdit.data.shapes import CLASS_NAMES
from stdit.evaluation.captions import caption
from stdit.evaluation.compare import Budget, Comparison, Run, differences, order, table
from stdit.recipes import compare

ROOT = Path(__file__).resolve().parents[2]
SPECS = sorted(path for path in (ROOT / "configs" / "compare").glob("*.yaml") if path.stem != "base")


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_every_comparison_and_every_variant_of_it_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = load_typed(Comparison, path)
    assert spec.name == path.stem
    for variant in spec.variants:
        assert compare.read_variant(spec, variant, 3, 7).name == f"{spec.name}-{variant}-3"
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ") and second.startswith("#   ")


def test_a_variant_that_trains_a_flow_map_is_refused_before_any_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = load_typed(Comparison, SPECS[0])
    spec.variants["map"] = {"objective.flow_map": True, "objective.name": "flow"}
    with pytest.raises(ValueError, match=r"variant 'map' trains a flow map .*; train it with stdit train, and compare"):
        compare.read_variant(spec, "map")


def run(variant: str, seed: int, frechet: float, both: float = 0.5) -> Run:
    return Run(variant, seed, {}, 10, 1000, 0.5, 1.0, 20.0, {"0.5": 1.0}, 0.5, 0.5, both, frechet)


def test_neighbours_in_the_order_differ_only_beyond_their_deviations():
    runs = [run("a", 0, 1.0), run("a", 1, 1.2), run("b", 0, 1.2), run("b", 1, 1.4), run("c", 0, 5.0), run("c", 1, 5.1)]
    assert order(runs) == "a ~ b < c"
    assert order([run("a", 0, 1, 0.2), run("b", 0, 1, 0.9)], "both") == "b < a"
    text = table(runs, "distance")
    assert "| a | 0.00 M | 0.500 | 10 | 1.0 ± 0.0 |" in text and "1.10 ± 0.10" in text


@pytest.mark.parametrize(
    ("budget", "steps"), [({"minutes": 2.0}, 60), ({"tokens": 1000.0}, 20), ({"gflops": 600.0}, 200), ({"steps": 7}, 7)]
)
def test_a_budget_gives_the_number_of_steps_that_fit(budget, steps):
    assert Budget(**budget).steps_for(seconds_per_step=2.0, tokens_per_step=50, gflops_per_step=3) == steps


def test_the_report_notes_a_variant_with_more_than_one_change():
    assert differences({}) == ""
    assert differences({"model.depth": 3}) == "`model.depth=3`"
    assert differences({"model.depth": 3, "train.lr": 1}).endswith("(differs in 2 things)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {}}, "variants is empty; give each variant a name"),
        ({"seeds": []}, "seeds is empty"),
        ({"budget": Budget()}, "gives nothing; give one of"),
        ({"budget": Budget(minutes=1, steps=3)}, "give one of minutes"),
        ({"budget": Budget(minutes=-1)}, "must be > 0, got -1"),
        ({"clips": 1}, "use 2 or more"),
        ({"variants": {"a/b": {}}}, "part of a folder's name"),
    ],
)
def test_invalid_comparisons_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**{"variants": {"a": {}}, "budget": Budget(steps=1), **changes})


BASE = {
    "name": "b", "data": {"source": "shapes", "num_frames": 5, "height": 32, "width": 32, "num_shapes": 40, "workers": 0},
    "model": {"size": "S/2", "depth": 2, "hidden_size": 32, "num_heads": 2},
    "train": {"batch_size": 4, "samples": 0, "precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tokens", "gflops"])
def test_variants_of_one_budget_cost_the_same(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(json.dumps(BASE))
    variants = {"small": {}, "deep": {"model.depth": 6}, "coarse": {"model.patch_size": [1, 4, 4]}}
    spec = Comparison(
        "c", base="base.yaml", variants=variants, budget=Budget(**{kind: 1e4 if kind == "tokens" else 10.0})
    )
    made = compare.plan(spec, tmp_path)
    spent = {}
    for name, about in made.items():
        tokens = {"small": 2 * 2 * 2, "deep": 2 * 2 * 2, "coarse": 2}[
            name
        ] * 4  # tokens per step: 2 latent frames, 4 clips
        spent[name] = about["steps"] * (tokens if kind == "tokens" else 3 * about["gflops"] * 4)
    assert min(spent.values()) > 0.99 * max(spent.values())
    steps = {name: about["steps"] for name, about in made.items()}
    assert steps["coarse"] > steps["small"] and (steps["deep"] < steps["small"]) == (kind == "gflops")


def test_a_comparison_trains_measures_writes_a_page_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(json.dumps(BASE))
    spec = {
        "name": "c", "base": "base.yaml", "variants": {"zero": {}, "plain": {"model.conditioning": "adaln"}},
        "budget": {"steps": 3}, "clips": 12, "reference": 12, "sample_steps": 2,
    }  # fmt: skip
    Path("c.yaml").write_text(json.dumps(spec))
    assert compare.main(["c.yaml"]) == 0
    page = Path("output/compare/c/comparison.md").read_text()
    assert (
        "| zero |" in page and "`model.conditioning=adaln`" in page and "Fréchet distance (latents of the VAE" in page
    )
    for picture in ("curves.png", "quality.png", "zero.png", "plain.png"):
        assert (Path("output/compare/c") / picture).stat().st_size > 0
    trained = []
    monkeypatch.setattr(compare.subprocess, "run", lambda *a, **k: trained.append(a) or pytest.fail("trained again"))
    assert compare.main(["c.yaml"]) == 0
    assert Path("output/compare/c/comparison.md").read_text() == page and not trained
    with pytest.raises(ValueError, match=r"differences: clips\)"):
        compare.main(["c.yaml", "clips=24"])


def test_sampled_captions_are_captions_of_the_data():
    spec = Comparison(variants={"a": {}}, budget=Budget(steps=1), clips=192)
    captions = [caption(*one) for one in compare.wanted(spec, Config(text=TextChoice(encoder="words")))]
    data = MovingShapes(DataConfig(source="shapes", num_shapes=2000))
    assert len(set(captions)) == 96 and set(captions) == {data.record(i)["caption"] for i in range(2000)}
    labels = compare.wanted(spec, Config())
    assert [f"{shape} {direction}" for _, shape, direction in labels[:12]] == list(CLASS_NAMES)


def test_a_typo_in_any_variant_is_found_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("name: b")
    Path("c.yaml").write_text(json.dumps({"name": "c", "base": "base.yaml", "variants": {"a": {}, "b": {"model.conditionin": "adaln"}}, "budget": {"steps": 1}}))  # fmt: skip
    with pytest.raises(ValueError, match="conditionin"):
        compare.main(["c.yaml"])
    assert not Path("output").exists()
    assert load_typed(Config, "base.yaml").name == "b"

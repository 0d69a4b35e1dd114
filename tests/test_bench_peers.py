"""The race of models, with stand-ins for the sources of others that have their interfaces."""

import sys

import pytest
import torch

from stdit.recipes import bench, bench_peers, peer_models
from stdit.recipes.bench_peers import RACES, run_race
from stdit.recipes.machine import Machine
from stdit.recipes.peer_sources import check_sources, import_source

CPU = Machine(torch.device("cpu"), full=False)
MODEL = """
import torch
from timm.models.vision_transformer import Mlp
from diffusion_of_{name} import there

class {name}(torch.nn.Module):
    def __init__(self, input_size, depth, hidden_size, num_heads, num_classes, **rest):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Mlp(4) for _ in range(depth)])

    def forward(self, x, t, y):
        assert len(x) == len(t) == len(y)
        for block in self.blocks:
            x = x + block(x.movedim(-3, -1)).movedim(-1, -3)
        return x

    def forward_with_cfg(self, x, t, y, cfg_scale):
        return self.forward(x, t, y)
"""
DIFFUSION = """
import torch

class Diffusion:
    num_timesteps = 10

    def training_losses(self, model, x, t, given):
        return {"loss": (model(x, t, **given) - x).square().flatten(1).mean(1)}

    def p_sample_loop(self, model, shape, noise, clip_denoised, model_kwargs, progress, device):
        for t in range(2):
            noise = model(noise, torch.full((len(noise),), t), **model_kwargs)
        return noise

def create_diffusion(spacing):
    return Diffusion()
"""
TIMM = """
import torch
from torchvision.ops.misc import FrozenBatchNorm2d

class Mlp(torch.nn.Linear):
    def __init__(self, size):
        super().__init__(size, size)

    def forward(self, x):  # torch compiles no function of its own alone
        return torch.tanh(super().forward(x))
"""


@pytest.fixture
def sources(tmp_path):
    for name, file in (("DiT", "DiT/models.py"), ("Latte", "Latte/models/latte.py")):
        path = tmp_path / file
        path.parent.mkdir(parents=True)
        path.write_text(MODEL.format(name=name))
        (path.parent / f"diffusion_of_{name}.py").write_text("there = True\n")
        (tmp_path / name / "diffusion").mkdir()
        (tmp_path / name / "diffusion/__init__.py").write_text(DIFFUSION)
    timm = tmp_path / "timm/models/vision_transformer.py"
    timm.parent.mkdir(parents=True)
    timm.write_text(TIMM)
    for folder in (timm.parent, timm.parent.parent):
        (folder / "__init__.py").write_text("")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "timm" or name.startswith("diffusion_of_")]:
        del sys.modules[name]


@pytest.mark.parametrize("race", [race for race in RACES if not race.compiled], ids=lambda race: race.name)
def test_every_model_of_a_race_trains_or_samples(sources, race):
    said = run_race(race, CPU, sources, rounds=1)
    other = "DiT" if race.kind == "images" else "Latte"
    assert said.startswith("stdit ") and f"; {other} " in said and "; diffusers " in said


@pytest.mark.slow
@pytest.mark.parametrize("race", [race for race in RACES if race.compiled], ids=lambda race: race.name)
def test_every_model_of_a_race_compiles_by_block(sources, race):
    assert "cannot be compiled" not in run_race(race, CPU, sources, rounds=1)


def test_our_model_and_those_of_diffusers_have_the_parameters_of_the_originals():
    size = bench_peers.IMAGES._replace(depth=2)
    counts = {}
    for name, make in (("stdit", peer_models.ours), ("diffusers", peer_models.diffusers_dit)):
        model = make(size, None, torch.device("meta")).model
        counts[name] = sum(p.numel() for key, p in model.named_parameters() if ".emb." not in key)
    # diffusers has the embedders of timesteps and labels in every block.
    embedders = 256 * 1152 + 1152**2 + 2 * 1152 + 1001 * 1152
    assert counts["stdit"] == counts["diffusers"] + embedders


@pytest.mark.slow
def test_a_model_that_breaks_a_graph_is_named_and_the_others_run(sources):
    file = sources / "DiT/models.py"
    file.write_text(file.read_text().replace("Mlp(4)", "Broken(4)").replace(
        "class DiT", "class Broken(Mlp):\n    def forward(self, x):\n        torch._dynamo.graph_break()\n        return x\n\nclass DiT"
    ))  # fmt: skip
    [race] = [race for race in RACES if race.name == "training images, bf16, compiled"]
    said = run_race(race, CPU, sources, rounds=1)
    assert "DiT cannot be compiled" in said and said.startswith("stdit ")


def test_sources_are_imported_apart_and_leave_nothing_behind(sources):
    paths, finders, loaded = list(sys.path), list(sys.meta_path), set(sys.modules)
    [models] = import_source(sources, "DiT", ["models"])
    [latte] = import_source(sources, "Latte/models", ["latte"])
    assert models.DiT and latte.Latte and sys.path == paths and sys.meta_path == finders
    assert not {"models", "diffusion", "latte", "torchvision"} & (set(sys.modules) - loaded)


def test_sources_that_are_missing_or_broken_are_one_line(sources, tmp_path):
    (sources / "DiT/models.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(ValueError, match="cannot be imported .*nowhere_to_be_found.*fetch it again"):
        import_source(sources, "DiT", ["models"])
    (sources / "Latte/models/latte.py").unlink()
    with pytest.raises(ValueError, match=r"lacks Latte, beside which .* git clone https://github.com/Vchitect/Latte"):
        check_sources(sources)
    with pytest.raises(ValueError, match="lacks Latte"):
        bench.main(["peers", "--peers", str(sources)])


def test_a_model_that_learns_nothing_finite_is_no_contestant(sources):
    file = sources / "DiT/models.py"
    file.write_text(file.read_text().replace("return x\n\n", "return x / 0\n\n"))
    with pytest.raises(ValueError, match="the loss of DiT is"):
        run_race(RACES[0], CPU, sources, rounds=1)

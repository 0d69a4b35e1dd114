"""Converted models against outputs of the originals (reference/, written by make_reference.py) and against diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel
from safetensors.torch import load_file

from stdit.checkpoint.convert import from_stdit, to_stdit, write_original
from stdit.checkpoint.files import Weights, read_weights
from stdit.conditions import Guided
from stdit.diffusion.objective import ObjectiveConfig, build_objective
from stdit.diffusion.paths import DDPMPath
from stdit.diffusion.predictions import Estimate
from stdit.diffusion.variational import posterior, variational_bound
from stdit.sampling.guidance import Guidance, guided
from stdit.sampling.schedule import Schedule
from stdit.sampling.solvers import DDIM, DDPM, solve

REFERENCE = Path(__file__).parent / "reference"

# Relative error that exponentials of another processor may leave: 1.4e-5 was seen, weights in the wrong place give > 1e-2.
ACROSS_PROCESSORS = 5e-5


def reference(name: str) -> tuple[dict, dict]:
    """(weights, inputs and outputs) of an original."""
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): v for key, v in tensors.items() if key.startswith("weights.")}
    return weights, {key: v for key, v in tensors.items() if not key.startswith("weights.")}


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def convert(name: str, form: str):
    weights, case = reference(name)
    return to_stdit(Weights(weights, {}, name), form, {"num_heads": 4}).model, case


@torch.no_grad()
def errors(name: str, form: str) -> list[float]:
    """The relative error of each sample, each with its own timestep and label, against the original."""
    model, case = convert(name, form)
    if form == "latte":
        ours = model(case["x"].transpose(1, 2), case["t"].float(), case["y"] if name == "latte" else None).transpose(
            1, 2
        )
    elif form == "sit":
        ours = -model(case["x"][:, :, None], 1000 * (1 - case["t"]), case["y"])[
            :, :, 0
        ]  # the velocity has the opposite sign
    else:
        labels = None if name.endswith("unconditional") else case["y"]
        begins = 1 if form == "uvit" else 0  # the number of its first step
        ours = model(case["x"][:, :, None], case["t"].float() - begins, labels)[:, :, 0]
    assert ours.shape == case["out"].shape  # without SiT's unused variance channels
    return [error(a, b) for a, b in zip(ours, case["out"], strict=True)]


CASES = [("dit", "dit"), ("sit", "sit"), ("latte", "latte"), ("latte_unconditional", "latte"),
         ("uvit", "uvit"), ("uvit_unconditional", "uvit"), ("mdt", "mdt")]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), CASES)
def test_outputs_equal_the_originals_at_every_timestep_and_label(name, form):
    assert max(errors(name, form)) < ACROSS_PROCESSORS


@torch.no_grad()
def test_a_masked_trunk_predicts_what_mdt_predicts():
    model, case = convert("mdt", "mdt")
    ours = model(case["x"][:, :, None], case["t"].float(), case["y"], visible=case["kept"])[:, :, 0]
    assert max(error(a, b) for a, b in zip(ours, case["masked"], strict=True)) < ACROSS_PROCESSORS


@torch.no_grad()
def test_a_converted_sit_gives_our_flow_objective_its_estimate_of_clean_data():
    model, case = convert("sit", "sit")
    objective, levels = build_objective(ObjectiveConfig(name="flow")), (1 - case["t"])[:, None]
    x = case["x"][:, :, None]
    clean = objective.estimate(model(x, objective.timestep(levels[:, 0]), case["y"]), x, levels).clean[:, :, 0]
    theirs = case["x"] + (1 - case["t"])[:, None, None, None] * case["out"]  # x_1 = x_t + (1 - t) velocity
    torch.testing.assert_close(clean, theirs, rtol=1e-5, atol=1e-5)


def test_latte_with_its_table_inside_attention_gives_different_outputs():
    weights, case = reference("latte")
    other = to_stdit(Weights(weights, {}, "latte"), "latte", {"num_heads": 4, "position_encoding": "sincos"}).model
    with torch.no_grad():
        ours = other(case["x"].transpose(1, 2), case["t"].float(), case["y"]).transpose(1, 2)
    assert error(ours, case["out"]) > 0.01


@pytest.mark.parametrize(("name", "form"), CASES)
def test_conversion_there_and_back_restores_every_weight_bit_for_bit(name, form, tmp_path):
    weights, _ = reference(name)
    model, _ = convert(name, form)
    back = from_stdit(model, form)
    if form == "sit":  # the unused half of the head is not kept
        weights = {k: v for k, v in weights.items() if "final_layer.linear" not in k}
        back = {k: v for k, v in back.items() if "final_layer.linear" not in k}
    assert set(back) == set(weights)
    tables = ("pos_embed", "temp_embed")
    assert all(torch.equal(back[k], weights[k]) for k in weights if k not in tables)
    assert all(torch.allclose(back[k], weights[k], atol=1e-6) for k in tables if k in weights)
    write_original(model, form, tmp_path / "back.pt")
    again = to_stdit(read_weights(tmp_path / "back.pt"), form, {"num_heads": 4}).model
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def random_diffusers(norm_eps: float) -> DiTTransformer2DModel:
    theirs = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5, norm_eps=norm_eps,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for value in theirs.parameters():
        value.data.copy_(
            torch.randn(value.shape, generator=generator) * (0.5 if value.ndim == 1 else value.shape[-1] ** -0.5)
        )
    first = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:  # copies of one, as in every released folder
        block.norm1.emb.load_state_dict(first)
    return theirs.eval()


@torch.no_grad()
def diffusers_errors(norm_eps: float, folder: Path) -> list[float]:
    """The error of converted diffusers weights against diffusers; also checks that converting back restores the weights."""
    theirs = random_diffusers(norm_eps)
    theirs.save_pretrained(folder / "theirs")
    model = to_stdit(read_weights(folder / "theirs"), "diffusers").model  # heads are in its config.json
    x, t, y = torch.randn(6, 4, 8, 8), torch.tensor([0, 1, 500, 998, 999, 37]), torch.tensor([0, 4, 5, 2, 5, 1])
    ours, want = model(x[:, :, None], t.float(), y)[:, :, 0], theirs(x, t, y).sample
    write_original(model, "diffusers", folder / "back")
    again = DiTTransformer2DModel.from_pretrained(folder / "back")
    assert torch.equal(again(x, t, y).sample, want)
    return [error(a, b) for a, b in zip(ours, want, strict=True)]


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-2])
def test_a_converted_diffusers_dit_gives_the_same_outputs(norm_eps, tmp_path):
    assert max(diffusers_errors(norm_eps, tmp_path)) < 1e-5


@torch.no_grad()
def test_sizes_that_are_not_square_work_unlike_in_the_originals():
    model, _ = convert("dit", "dit")
    wide = model(torch.randn(1, 4, 1, 8, 12, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0]))
    assert wide.shape == (1, 8, 1, 8, 12)


PATH = DDPMPath()


def diffusion() -> dict:
    return {k: v.double() if v.is_floating_point() else v for k, v in reference("diffusion")[1].items()}


def frames(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, 1, H, W)."""
    return x[:, :, None]


def test_noisy_data_posterior_and_bound_equal_dits():
    case = diffusion()
    levels = ((case["t"] + 1).double() / 1000)[:, None]
    objective = build_objective(ObjectiveConfig(name="ddpm"))
    noisy = objective.noisy(frames(case["start"]), frames(case["noise"]), levels)[:, :, 0]
    torch.testing.assert_close(noisy, case["q_sample"], rtol=0, atol=1e-6)
    mean, variance, _ = posterior(PATH, frames(case["x"]), frames(case["start"]), levels, levels - 1e-3)
    torch.testing.assert_close(mean[:, :, 0], case["posterior_mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(variance[:, 0, 0, 0, 0], case["posterior_variance"][:, 0, 0, 0], rtol=0, atol=1e-6)
    estimate = objective.estimate(frames(case["out"]), frames(case["q_sample"]), levels)
    bound = variational_bound(PATH, frames(case["q_sample"]), frames(case["start"]), estimate, levels, 1e-3)
    bits = bound.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(bits, case["bound"], rtol=0, atol=1e-6)


def test_the_hybrid_loss_equals_dits():
    case = diffusion()
    levels = ((case["t"] + 1).double() / 1000)[:, None]
    objective = build_objective(ObjectiveConfig(name="ddpm"))
    ours = objective.loss(
        frames(case["out"]), frames(case["q_sample"]), frames(case["start"]), frames(case["noise"]), levels
    )
    torch.testing.assert_close(ours.mean((1, 2, 3)).double(), case["loss"], rtol=0, atol=1e-6)


def test_respaced_timesteps_equal_dits():
    for spec, kept in json.loads((REFERENCE / "timesteps.json").read_text()).items():
        assert PATH.respaced_steps(spec) == kept, spec
    assert PATH.respaced_steps(250) == PATH.respaced_steps("250")
    with pytest.raises(ValueError, match="no whole stride visits 300 steps. Use ddim334"):
        PATH.respaced_steps("ddim300")


@pytest.mark.parametrize("spec", ["1000", "25", "ddim50"])
def test_one_step_of_ddim_and_of_ancestral_sampling_equals_dits(spec):
    case = diffusion()
    index, kept = case[f"{spec}.index"], case[f"{spec}.kept"]
    schedule = torch.cat([torch.zeros(1).double(), (kept + 1).double() / 1000])
    now, after = schedule[index + 1][:, None], schedule[index][:, None]
    objective, n = build_objective(ObjectiveConfig(name="ddpm")), len(index)
    x, out = frames(case["x"][:n]), frames(case["out"][:n])

    def predict(x, levels) -> Estimate:
        return objective.estimate(out, x, levels)

    for solver, name in ((DDIM, "ddim"), (DDPM, "ancestral")):
        ours = solver(PATH).step(x, now, after, predict, lambda: frames(case[f"{spec}.drawn"]))[:, :, 0]
        scale = case[f"{spec}.{name}"].abs().amax(dim=(1, 2, 3)).clamp(min=1)
        assert ((ours - case[f"{spec}.{name}"]).abs().amax(dim=(1, 2, 3)) / scale).max() < 1e-6


def test_guidance_on_three_channels_leaves_the_fourth_and_the_variance_alone(tiny_model):
    model, objective = tiny_model(axes=["spatial"]), build_objective(ObjectiveConfig(name="ddpm"))
    x, levels, labels = torch.randn(2, 4, 1, 8, 8), torch.full((1, 1), 0.5), torch.tensor([1, 2])
    plain, all_of_it, three = (
        guided(model, objective, Guided({"label": labels[:, None]}, {"label": torch.full((2, 1), 5)}), Guidance(*how))(
            x, levels
        )
        for how in ((1.0,), (3.0,), (3.0, (0.0, 1.0), 3))
    )
    torch.testing.assert_close(three[:, :3], all_of_it[:, :3])
    torch.testing.assert_close(three[:, 3:], plain[:, 3:])
    assert not torch.allclose(all_of_it[:, 3], plain[:, 3])


def test_a_whole_respaced_chain_ends_at_the_data_that_the_network_predicts():
    levels = PATH.schedule("ddim50")[:, None]
    assert (len(levels), float(levels[-1])) == (51, 0.0)
    data = torch.randn(1, 1, 1, 2, 2).double()

    def predict(x, now) -> Estimate:
        alpha, sigma = PATH.alpha_sigma(now.double())
        return Estimate(data, (x - alpha[..., None, None] * data) / sigma[..., None, None])

    end = solve(Schedule(torch.randn_like(data), levels), predict, PATH, "ddim")
    torch.testing.assert_close(end, data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["dit", "sit", "latte"])
@torch.no_grad()
def test_the_timestep_embedding_equals_the_originals_at_every_timestep(form):
    model, case = convert(form, form)
    times = 1000 * (1 - case["clock"]) if form == "sit" else case["clock"].float()
    assert len(times) >= 1000
    assert error(model.t_embedder(times), case["clock_out"]) < 1e-5


@torch.no_grad()
def test_diffusers_latte_with_captions_converts_with_equal_outputs_and_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    theirs = LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=32,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12, video_length=5,
    ).eval()  # fmt: skip
    for value in theirs.parameters():
        value.copy_(0.3 * torch.randn(value.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    model = to_stdit(read_weights(tmp_path / "theirs"), "diffusers_latte").model
    x, words, mask = torch.randn(3, 4, 5, 8, 8), torch.randn(3, 7, 12), torch.arange(7) < torch.tensor([[7], [3], [1]])
    for time in (0, 500, 999):
        t = torch.full((3,), time)
        out = theirs(x, t, words, mask.repeat_interleave(5, 0)).sample
        assert error(model(x, t.float(), captions=words, caption_mask=mask), out) < 1e-5
    write_original(model, "diffusers_latte", tmp_path / "back")
    again = LatteTransformer3DModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())


if __name__ == "__main__":  # python tests/checkpoint/test_exactness.py: the table of dev/LOG.md
    import tempfile

    for name, form in CASES:
        print(f"{name:<22} {max(errors(name, form)):.1e}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'diffusers':<22} {max(diffusers_errors(1e-5, Path(folder))):.1e}")

"""Guidance by a weaker model (Karras et al.) and CFG-Zero* (Fan et al.)."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file

from stdit import STDiT, STDiTPipeline
from stdit.config import Config, load_typed
from stdit.recipes import train
from stdit.recipes.build import build_teacher
from stdit.sampling.guidance import GUIDERS
from stdit.sampling.scheduler import STDiTScheduler
from stdit.vae import TinyVAE, load_vae

CALL = {
    "class_labels": [1, 2],
    "num_frames": 5,
    "height": 32,
    "width": 32,
    "num_inference_steps": 3,
    "progress": False,
    "precision": "fp32",
}
TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 8, workers: 0}
model: {size: S/2, depth: 1, hidden_size: 32, num_heads: 2}
train: {steps: 4, batch_size: 2, lr: 1.0e-2, ema_decay: 0.9, checkpoint_every: 2, samples: 0, precision: fp32, guide_step: 2}
"""


@pytest.fixture
def models(tiny_model):
    vae = fill(TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8)))
    strong = tiny_model(in_channels=16, learn_sigma=False)
    weak = tiny_model(in_channels=16, learn_sigma=False)
    with torch.no_grad():
        for p in weak.parameters():
            p.mul_(0.7)
    return strong, weak, vae


def pipeline(models, guide=None) -> STDiTPipeline:
    strong, _, vae = models
    return STDiTPipeline(strong, vae, STDiTScheduler("flow"), num_frames=5, height=32, width=32, guide=guide)


def test_cfg_zero_leads_away_from_the_nearest_multiple_of_the_null_output():
    torch.manual_seed(0)
    conditional, null = torch.randn(2, 2, 3, 4, 1, 1)
    zero = partial(GUIDERS["cfg_zero"], levels=torch.ones(2, 4))
    assert torch.allclose(zero(conditional, 5 * null, 3.0), zero(conditional, null, 3.0), atol=1e-5)
    assert torch.allclose(zero(conditional, 0.3 * conditional, 3.0), conditional, atol=1e-5)
    away = (zero(conditional, null, 2.0) - conditional).flatten(1)
    assert torch.allclose((away * null.flatten(1)).sum(1), torch.zeros(2), atol=1e-4)  # orthogonal to it


def test_guidance_away_from_a_guide_widens_each_frame_by_three_tenths_of_what_it_would():
    torch.manual_seed(0)
    conditional, weaker = torch.randn(2, 2, 4, 3, 5, 6)
    levels = torch.ones(1, 3)
    outputs = [conditional, *(GUIDERS[name](conditional, weaker, 3.0, levels) for name in ("cfg", "auto"))]
    own, plain, auto = (x - x.mean((3, 4), keepdim=True) for x in outputs)
    spread = [x.transpose(1, 2).flatten(2).std(2, correction=0) for x in (own, plain, auto)]
    assert torch.allclose(spread[2], 0.7 * spread[0] + 0.3 * spread[1], atol=1e-5)
    assert torch.allclose(auto / plain, (auto / plain)[:, :1, :, :1, :1].expand_as(auto), atol=1e-3)
    of_one_frame = GUIDERS["auto"](conditional[:, :, 1:2], weaker[:, :, 1:2], 3.0, levels[:, :1])
    assert torch.allclose(of_one_frame, outputs[2][:, :, 1:2], atol=1e-6)  # it does not depend on the other frames


def test_guidance_away_from_a_guide_leaves_the_mean_of_every_channel_of_a_frame():
    torch.manual_seed(0)
    conditional, weaker = torch.randn(2, 2, 4, 3, 6, 6) + torch.tensor([0.0, 5.0]).view(2, 1, 1, 1, 1, 1)
    auto = GUIDERS["auto"](conditional, weaker, 3.0, torch.ones(2, 3))
    assert torch.allclose(auto.mean((3, 4)), conditional.mean((3, 4)), atol=1e-5)
    assert not torch.allclose(auto, conditional, atol=0.1)


def test_known_patches_count_neither_for_the_mean_nor_for_the_spread_of_a_frame():
    torch.manual_seed(0)
    conditional, weaker = torch.randn(2, 2, 4, 3, 6, 8)
    levels = torch.ones(1, 3, 3, 4)
    levels[:, :, :, 2:] = 0  # of every frame the right half is known
    auto = partial(GUIDERS["auto"], scale=3.0, levels=levels)
    left = (..., slice(0, 4))
    alone = GUIDERS["auto"](conditional[left], weaker[left], 3.0, torch.ones(1, 3))
    assert torch.allclose(auto(conditional, weaker)[left], alone, atol=1e-5)
    assert torch.equal(auto(conditional, weaker)[..., 4:], conditional[..., 4:])
    all_known = GUIDERS["auto"](conditional, weaker, 3.0, torch.zeros(1, 3))
    assert torch.equal(all_known, conditional)


def test_a_guide_is_led_away_from_by_default_and_only_above_scale_1(models):
    weak = models[1]
    plain, guided = pipeline(models), pipeline(models, weak)
    same = plain(**CALL, guidance_scale=1.0)
    assert torch.equal(guided(**CALL, guidance_scale=1.0), same)
    away = guided(**CALL, guidance_scale=2.0)
    assert torch.equal(away, guided(**CALL, guidance_scale=2.0, guider="auto"))
    assert not torch.allclose(away, same) and not torch.allclose(away, plain(**CALL, guidance_scale=2.0))
    assert torch.equal(guided(**CALL, guidance_scale=2.0, guider="cfg"), plain(**CALL, guidance_scale=2.0))


def test_a_guide_is_led_away_from_above_level_half_unless_the_call_says_otherwise(models):
    guided = pipeline(models, models[1])
    default = guided(**CALL, guidance_scale=2.0)
    assert torch.equal(default, guided(**CALL, guidance_scale=2.0, guidance_interval=(0.5, 1.0)))
    everywhere = guided(**CALL, guidance_scale=2.0, guidance_interval=(0.0, 1.0))
    assert not torch.allclose(default, everywhere)
    by_none = guided(**CALL, guidance_scale=2.0, guider="cfg")
    assert torch.equal(by_none, guided(**CALL, guidance_scale=2.0, guider="cfg", guidance_interval=(0.0, 1.0)))


def test_a_guide_as_good_as_the_model_changes_nothing(models):
    guided = pipeline(models, models[0])
    assert torch.equal(guided(**CALL, guidance_scale=3.0), guided(**CALL, guidance_scale=1.0))


def test_negative_conditions_are_what_guidance_leads_away_from_with_a_guide_too(models):
    plain, guided = pipeline(models), pipeline(models, models[1])
    call = {**CALL, "guidance_scale": 2.0, "negative_class_labels": [3, 4]}
    assert torch.equal(guided(**call), plain(**call))


def test_a_saved_guide_samples_as_before(models, tmp_path):
    guided = pipeline(models, models[1])
    guided.save_pretrained(tmp_path / "m")
    again = STDiTPipeline.from_pretrained(tmp_path / "m")
    assert torch.equal(again(**CALL), guided(**CALL))
    without = STDiTPipeline.from_pretrained(tmp_path / "m", guide=None)
    assert torch.equal(without(**CALL), pipeline(models)(**CALL))


def test_a_guide_of_a_strange_class_is_refused(models, tmp_path):
    pipeline(models, models[1]).save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m/model_index.json").read_text())
    (tmp_path / "m/model_index.json").write_text(json.dumps({**index, "guide": ["os", "system"]}))
    with pytest.raises(ValueError, match="as its guide, which is none of stdit's"):
        STDiTPipeline.from_pretrained(tmp_path / "m")


def test_a_guide_with_other_inputs_is_refused(models, tiny_model):
    with pytest.raises(ValueError, match="guide takes other inputs"):
        pipeline(models, tiny_model(in_channels=16, learn_sigma=False, num_classes=3))


def test_a_causal_model_takes_negative_conditions_and_no_guider_auto(tiny_model, models):
    causal = tiny_model(in_channels=16, learn_sigma=False, causal=True, position_encoding="rope_3d")
    pipe = pipeline((causal, None, models[2]), causal)
    call = {**CALL, "class_labels": [1]}
    assert not torch.equal(
        pipe(**call, guidance_scale=2.0, negative_class_labels=[3]), pipe(**call, guidance_scale=2.0)
    )
    with pytest.raises(ValueError, match="leave out guider=auto"):
        pipe(**call, guider="auto")


def test_negative_conditions_that_have_no_effect_are_said(models):
    with pytest.warns(UserWarning, match="guider='auto'"):
        pipeline(models, models[1])(**CALL, guider="auto", negative_class_labels=[3, 4])


def test_the_guider_auto_needs_a_guide(models):
    with pytest.raises(ValueError, match="train.guide_step=STEP"):
        pipeline(models)(**CALL, guider="auto")


def test_training_keeps_the_averaged_weights_of_the_guides_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml", "train.steps=2", "name=parts"]) == 0
    assert train.run(["t.yaml", "name=parts"]) == 0
    assert train.run(["t.yaml"]) == 0
    guide, early = (
        load_file("checkpoints/t/step-4/guide.safetensors"),
        load_file("checkpoints/t/step-2/ema.safetensors"),
    )
    assert all(torch.equal(guide[name], value) for name, value in early.items())
    resumed = load_file("checkpoints/parts/step-4/guide.safetensors")
    assert all(torch.equal(guide[name], value) for name, value in resumed.items())
    exported = STDiTPipeline.from_pretrained("models/t").guide.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in early.items())
    assert not torch.equal(
        exported["x_embedder.proj.weight"],
        STDiTPipeline.from_pretrained("models/t").transformer.state_dict()["x_embedder.proj.weight"],
    )


def test_a_guide_step_that_no_step_reaches_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TINY)
    assert train.run(["t.yaml", "train.steps=1"]) == 0
    assert "the model gets no guide" in capsys.readouterr().out


def test_a_flow_map_learns_on_without_a_guide(tmp_path):
    STDiT(1, 16, 2, in_channels=16, sample_size=(1, 4, 4), flow_map=True, learn_sigma=False).save_pretrained(
        tmp_path / "map"
    )
    vae = load_vae("tiny")
    config = load_typed(Config, "quickstart_few", [f"init_from.path={tmp_path / 'map'}"])
    for guidance in ({"distilled_scales": {"cfg": 3.0}}, {"distilled_scales": {}, "distilled_guider": "auto"}):
        for key, value in guidance.items():
            setattr(config.objective, key, value)
        with pytest.raises(ValueError, match="is a flow map itself, which learns on without a teacher; use .*cfg"):
            build_teacher(config, vae, torch.device("cpu"))
    config.objective.distilled_guider = "cfg"
    assert build_teacher(config, vae, torch.device("cpu")) is None

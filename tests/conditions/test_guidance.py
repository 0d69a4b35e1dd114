"""A flow map that takes the scale of guidance as a condition: what it learns, and how it is sampled."""

import warnings

import pytest
import torch
from conftest import fill
from safetensors.torch import load_file

from stdit.conditions import Label, LearntGuidance
from stdit.conditions.guidance import PLAIN_SHARE
from stdit.config import Config, load_typed
from stdit.diffusion.config import ObjectiveConfig
from stdit.diffusion.levels import GUIDE_INTERVAL
from stdit.diffusion.objective import build_objective
from stdit.model.stdit import STDiT
from stdit.recipes import train
from stdit.recipes.build import build_teacher
from stdit.recipes.info import main as info
from stdit.recipes.models import load_start
from stdit.sampling.guidance import GUIDERS
from stdit.sampling.pipeline import STDiTPipeline
from stdit.sampling.scheduler import STDiTScheduler
from stdit.training.step import FlowMapTraining, LatentBatch, diffusion_losses
from stdit.vae import load_vae
from stdit.vae.tiny import TinyVAE

SCALES = {"cfg": 5.0, "auto": 3.0}  # numbers of a value: auto, cfg
LEARNT = {"flow_map": True, "extra_conditions": {"guidance": {"scales": SCALES}}}
TINY = """
name: t
data: {source: shapes, num_frames: 5, height: 32, width: 32, num_shapes: 8, workers: 0}
model: {size: S/2, depth: 2, hidden_size: 32, num_heads: 2}
train: {steps: 4, batch_size: 2, lr: 1.0e-2, ema_decay: 0.9, checkpoint_every: 2, samples: 0, precision: fp32, trackers: [],
        preview_every: 100}
"""
FAST = {"num_inference_steps": 2, "progress": False, "num_frames": 5, "height": 16, "width": 16}


def build(**changes) -> STDiT:
    torch.manual_seed(0)
    sizes = {"depth": 2, "hidden_size": 24, "num_heads": 2, "in_channels": 4, "num_classes": 3}
    return STDiT(**{**sizes, "sample_size": (5, 4, 4), "learn_sigma": False, "axes": ["joint"], **changes}).eval()


def make_pipe(tiny_model, scales=SCALES, **model) -> STDiTPipeline:
    learnt = {"flow_map": True, "extra_conditions": {"guidance": {"scales": scales}}}
    network = tiny_model(in_channels=16, num_classes=3, learn_sigma=False, **learnt, **model)
    vae = TinyVAE(encoder_widths=(8, 8), decoder_widths=(8, 8, 8))
    return STDiTPipeline(network, vae, STDiTScheduler("flow", learn_sigma=False), 5, 16, 16, 8.0, "flow")


def scales_of(clips) -> torch.Tensor:
    return LearntGuidance(SCALES).of_keys([(0, 3, slot) for slot in clips])


def test_every_clip_draws_one_guider_and_its_scale_or_none_by_key():
    drawn = scales_of(range(400))
    assert torch.equal(drawn[37:41], scales_of(range(37, 41)))
    assert ((drawn > 1).sum(1) <= 1).all()
    assert abs(int((drawn == 1).all(1).sum()) - 400 * PLAIN_SHARE) < 30
    assert 2.8 < drawn[:, 0].max() <= 3.0 and 4.8 < drawn[:, 1].max() <= 5.0
    assert abs(int((drawn[:, 0] > 1).sum()) - 200 * (1 - PLAIN_SHARE)) < 40


def test_another_label_is_a_function_of_the_clips_key_and_only_labels_have_one():
    label, keys = Label(12), [(0, 3, slot) for slot in range(200)]
    values = torch.zeros(200, dtype=torch.long)
    other = label.redraw(values, keys)
    assert torch.equal(other[50:60], label.redraw(values[50:60], keys[50:60]))
    assert other.dtype == values.dtype and sorted(set(other.tolist())) == list(range(12))
    assert LearntGuidance(SCALES).redraw(values, keys) is values


@torch.no_grad()
def test_a_fresh_condition_on_scales_changes_nothing():
    plain, learnt = fill(build(flow_map=True)), build(**LEARNT)
    missing = learnt.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("guidance_embedder") for name in missing)
    x, t, y = torch.randn(2, 4, 5, 4, 4), torch.tensor([300.0, 800.0]), torch.tensor([0, 2])
    expected = plain(x, t, y)
    assert torch.equal(learnt(x, t, y), expected)
    assert torch.equal(learnt(x, t, y, guidance_scales=torch.tensor([[2.0, 1.0], [1.0, 4.0]])), expected)
    fill(learnt.guidance_embedder)
    assert not torch.equal(learnt(x, t, y, guidance_scales=torch.tensor([[2.0, 1.0], [1.0, 4.0]])), expected)


@pytest.mark.parametrize("strategy", ["shared", "prefix", "region"])
def test_the_target_is_the_teachers_velocity_at_the_scale_of_each_clip(strategy, monkeypatch):
    from stdit.diffusion import objective as module

    monkeypatch.setattr(module, "VELOCITY_SHARE", 1.1)  # the velocity itself, without segments
    teacher, guide = fill(build()), fill(build(), 0.2)
    scales, labels, null = scales_of(range(12)), torch.tensor([[0], [1], [2], [1]] * 3), torch.full((12, 1), 3)
    above: set[bool] = set()

    def guided(x, timestep, conditions, target_timestep):
        """A model that gives the velocity which it is to learn."""
        with torch.no_grad():
            plain = teacher(x, timestep, conditions={"label": labels})
            away = [teacher(x, timestep, conditions={"label": null}), guide(x, timestep, conditions={"label": labels})]
        auto, cfg = conditions["guidance"][:, 0].unbind(1)
        high = timestep.flatten(1).amax(1) >= objective.timestep(torch.tensor(GUIDE_INTERVAL[0]))
        by = [scale.view(-1, 1, 1, 1, 1) for scale in (cfg, torch.where(high, auto, 1.0))]
        above.update(high[auto > 1].tolist())
        levels = timestep.unflatten(2, (2, 2)) if timestep.ndim == 3 else timestep.view(len(x), -1)
        pairs = zip(("cfg", "auto"), away, by, strict=True)
        steps = [GUIDERS[name](plain, *pair, levels) - plain for name, *pair in pairs]
        return plain + sum(steps)

    latents = torch.randn(12, 4, 5, 4, 4)
    conditions = {"label": labels, "guidance": scales[:, None]}
    given = FlowMapTraining(guided, {"label": null, "guidance": scales[:, None]}, teacher, guide)
    objective = build_objective(ObjectiveConfig(flow_map=True, distilled_scales=SCALES))
    losses = diffusion_losses(
        guided, objective, [LatentBatch(latents, lambda mask: latents.transpose(1, 2)[mask])], conditions,
        [(0, 3, slot) for slot in range(12)], patch=(1, 2, 2), strategy=strategy, flow_map=given,
    )  # fmt: skip
    assert losses.clips.max() < 1e-10 and above == {True, False}


@torch.no_grad()
def test_a_call_runs_the_network_once_a_step_at_the_scale_it_asks_for(tiny_model):
    pipe = make_pipe(tiny_model)
    fill(pipe.transformer.guidance_embedder)
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda model, args, given: seen.append((len(given["hidden_states"]), given["guidance_scales"].tolist())),
        with_kwargs=True,
    )
    default = pipe(1, **FAST)
    assert seen == [(1, [[[2.0, 1.0]]])] * 2  # away from the guide, by 2
    assert torch.equal(default, pipe(1, guider="auto", guidance_scale=2.0, **FAST))
    seen.clear()
    other = pipe(1, guider="cfg", guidance_scale=4.0, **FAST)
    assert seen == [(1, [[[1.0, 4.0]]])] * 2 and not torch.equal(other, default)
    seen.clear()
    pipe(1, guidance_scale=1.0, **FAST)
    assert seen == [(1, [[[1.0, 1.0]]])] * 2


@torch.no_grad()
def test_streams_and_saved_models_keep_the_learnt_scales(tiny_model, tmp_path, capsys):
    causal = {"axes": ["joint"], "causal": True, "position_encoding": "rope_3d", "window": 2}
    pipe = make_pipe(tiny_model, **causal)
    fill(pipe.transformer.guidance_embedder)
    clip, given = torch.rand(1, 3, 5, 16, 16), {"num_inference_steps": 2, "progress": False}

    def stream(pipe, **options):
        return torch.cat(list(pipe.stream(clip, 8, 0, **given, **options)), 2)

    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda model, args, kw: calls.append(len(kw["hidden_states"])), with_kwargs=True
    )
    found = stream(pipe)
    handle.remove()
    assert set(calls) == {1}
    assert not torch.equal(found, stream(pipe, guider="cfg", guidance_scale=4.0))
    pipe.save_pretrained(tmp_path / "m")
    assert torch.equal(found, stream(STDiTPipeline.from_pretrained(tmp_path / "m")))
    assert info([str(tmp_path / "m")]) == 0
    assert "auto 1 to 3, cfg 1 to 5, learnt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"guidance_scale": 4.0},
            "guidance_scale=4 .--guidance. is not among those that this model has learnt for 'auto', 1 to 3",
        ),
        ({"guidance_scale": 0.5, "guider": "cfg"}, "1 to 5"),
        (
            {"guider": "cfg_zero"},
            r"guider='cfg_zero' \(--guider\) is none of those that this model has learnt; choose one of: auto, cfg",
        ),
        ({"guidance_interval": (0.5, 1.0)}, "guidance_interval"),
    ],
)
def test_what_was_not_learnt_is_refused(tiny_model, options, words):
    with pytest.raises(ValueError, match=words):
        make_pipe(tiny_model)(1, **FAST, **options)


def test_a_refusal_writes_scales_with_all_their_digits():
    with pytest.raises(ValueError, match=r"guidance_scale=3\.0000001 .* for 'auto', 1 to 3;"):
        LearntGuidance(SCALES).at_scale("auto", 3.0000001)
    with pytest.raises(ValueError, match=r"guidance_scale=4 .* for 'cfg', 1 to 3\.12345678;"):
        LearntGuidance({"cfg": 3.12345678}).at_scale("cfg", 4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.distilled_scales={cfg: 5}"], "does not go with objective.flow_map=false"),
        (["objective.flow_map=true", "objective.distilled_scales={cfg: 0.5}"], "must have the largest scale, above 1"),
        (["objective.flow_map=true", "objective.distilled_scales={apg: 3}"], "guider cfg or auto, got apg"),
        (
            ["objective.flow_map=true", "objective.distilled_scales={cfg: 3}", "objective.distilled_guidance=2", "train.guidance=1"],
            "does not go with objective.distilled_guidance=2",
        ),
        (["objective.flow_map=true", "objective.distilled_scales={cfg: 3}"], "needs a teacher"),
        (["model.extra_conditions={guidance: {scales: {cfg: 3}}}"], "is what objective.distilled_scales turns on"),
        (["objective.flow_map=true", "objective.distilled_scales={cfg: 3}", "init_from.path=m", "train.guidance=4"], "train.guidance=4"),
        (["objective.flow_map=true", "objective.distilled_scales={cfg: 5, auto: 3}", "init_from.path=m", "train.guidance=4"], "for the guider auto"),
    ],
)  # fmt: skip
def test_scales_that_cannot_be_learnt_are_refused(tmp_path, overrides, words):
    (tmp_path / "t.yaml").write_text("name: t\n")
    with pytest.raises(ValueError, match=words):
        load_typed(Config, tmp_path / "t.yaml", overrides)


def test_an_override_leaves_a_guider_out_of_a_config_that_names_it():
    auto = load_typed(Config, "quickstart_few", ["objective.distilled_scales.auto=1"])
    assert set(auto.objective.distilled_scales) == {"cfg"}
    both = ["objective.distilled_scales={cfg: 1, auto: 1}", "objective.distilled_guidance=2", "train.guidance=1"]
    assert load_typed(Config, "quickstart_few", both).objective.distilled_scales == {}


@torch.no_grad()
def test_scales_of_calls_and_callbacks_are_those_that_were_learnt(tiny_model):
    pipe = make_pipe(tiny_model)
    fill(pipe.transformer.guidance_embedder)
    for keyword in ("negative_class_labels", "guidance_scales"):
        with pytest.raises(ValueError, match=f"^{keyword}"):
            pipe(1, **FAST, **{keyword: 0 if keyword != "guidance_scales" else [[1.0, 1.0]]})

    def raised(scale):
        def callback(pipe, step, timestep, tensors):
            pipe._guidance_scale = scale
            return tensors

        return pipe(1, **FAST, guider="cfg", guidance_scale=2.0, callback_on_step_end=callback)

    assert not torch.equal(raised(5.0), raised(2.0))
    with pytest.raises(ValueError, match="guidance_scale=50 .--guidance. is not among those"):
        raised(50.0)
    low = make_pipe(tiny_model, scales={"cfg": 1.5, "auto": 3.0})
    assert torch.equal(low(1, guider="cfg", **FAST), low(1, guider="cfg", guidance_scale=1.5, **FAST))


def test_a_run_learns_the_scales_of_its_teacher_and_goes_on_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    assert train.run(["t.yaml", "name=teacher", "train.guide_step=2"]) == 0
    few = [
        "t.yaml",
        "init_from.path=models/teacher",
        "objective.flow_map=true",
        "objective.distilled_scales={cfg: 4, auto: 3}",
    ]
    assert train.run([*few, "name=whole"]) == 0
    assert train.run([*few, "name=parts", "train.steps=2"]) == 0 and train.run([*few, "name=parts"]) == 0
    whole, parts = (
        load_file(f"models/{name}/transformer/diffusion_pytorch_model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() and all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any(whole[name].abs().sum() > 0 for name in whole if name == "guidance_embedder.out.weight")
    exported = STDiTPipeline.from_pretrained("models/whole")
    assert exported.guide is None and exported.engine.learnt_guidance.scales == {"auto": 3.0, "cfg": 4.0}


@pytest.mark.parametrize("routed", [0.0, 0.5])
def test_patches_skip_blocks_in_training_and_in_no_held_out_loss(tmp_path, monkeypatch, routed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    seen = []
    forward = STDiT.forward

    def counted(self, *args, **given):
        seen.append((torch.is_grad_enabled(), given.get("visible") is not None))
        return forward(self, *args, **given)

    monkeypatch.setattr(STDiT, "forward", counted)
    monkeypatch.setattr("stdit.training.fit.flops_of_config", lambda *args: 1.0)
    options = [f"objective.route_ratio={routed}", "model.depth=3", "train.holdout=0.3", "train.average_lengths=[]"]
    assert train.run(["t.yaml", *options]) == 0
    assert {by for learning, by in seen if learning} == {routed > 0}
    assert {by for learning, by in seen if not learning} == {False}


def test_a_model_with_learnt_scales_is_no_start_of_another_training(tmp_path):
    build(**LEARNT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has learnt scales of guidance .* train the model that was its teacher"):
        load_start(str(tmp_path))


def test_a_guide_is_loaded_where_its_scales_are_learnt(tmp_path):
    build(in_channels=16).save_pretrained(tmp_path / "m" / "transformer")
    scales = ["objective.distilled_guider=cfg", "objective.distilled_guidance=1", "train.guidance=2"]
    config = load_typed(
        Config,
        "quickstart_few",
        [*scales, f"init_from.path={tmp_path / 'm' / 'transformer'}", "objective.distilled_scales={auto: 3}"],
    )
    with pytest.raises(ValueError, match="has no folder guide"):
        build_teacher(config, load_vae("tiny"), torch.device("cpu"))
    build(in_channels=16).save_pretrained(tmp_path / "m" / "guide")
    assert build_teacher(config, load_vae("tiny"), torch.device("cpu")).guide is not None


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_guider_of_which_no_scale_is_learnt_is_warned_of_before_training(tmp_path, scale):
    for part in ("transformer", "guide"):
        build(in_channels=16).save_pretrained(tmp_path / "m" / part)
    guider = ["objective.distilled_guider=auto", f"objective.distilled_guidance={scale}", "train.guidance=1"]
    neither = "objective.distilled_scales={cfg: 1, auto: 1}"
    config = load_typed(
        Config, "quickstart_few", [*guider, neither, f"init_from.path={tmp_path / 'm' / 'transformer'}"]
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        build_teacher(config, load_vae("tiny"), torch.device("cpu"))
    words = [str(one.message) for one in said]
    if scale == 1:
        assert (
            len(words) == 1 and "distilled_guider=auto has no effect with objective.distilled_guidance=1," in words[0]
        )
    else:
        assert words == []


def test_guidance_by_no_condition_is_not_learnt_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.yaml").write_text(TINY)
    fewer = ["model.num_classes=0", "model.micro_conditions=[fps]"]  # guidance leaves the frame rate as it is
    options = ["objective.flow_map=true", "objective.distilled_guidance=2", "train.guidance=1", *fewer]
    assert train.run(["t.yaml", *options]) == 1
    assert "without label, caption or actions, and this model has none" in capsys.readouterr().err

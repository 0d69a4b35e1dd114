"""Validate a sampling call against a model before any work; warn about conditioning that training did not have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stdit.conditions import Actions, Conditioner, Conditions
from stdit.ranges import exact
from stdit.sampling.canvas import Canvas
from stdit.sampling.engine import Engine
from stdit.sampling.groups import is_continuation
from stdit.sampling.inputs import NEGATIVE
from stdit.sampling.options import SamplingOptions
from stdit.sampling.solvers import SOLVERS
from stdit.variants import pick
from stdit.warn import warn_user


def check(engine: Engine, canvas: Canvas, options: SamplingOptions, *, frames: int) -> None:
    """Raise ValueError, in one line, if this model cannot fill this canvas with these options.

    frames: the frames of a window, or of a whole stream.
    """
    height, width = canvas.pixels.shape[3:]
    shape = engine.latent_shape((frames, height, width))
    _check_channels(engine, options)
    _check_guidance(engine, options)
    _check_shift(engine, options)
    _check_scheduler(engine, canvas, options, shape)
    _check_stagger(engine, options, shape)
    if canvas.mask.shape[1] > 1 and not engine.model.supports_patch_levels:
        raise ValueError(
            "a spatial mask needs a noise level per patch, but this model takes levels per frame; mask whole frames, or use a "
            "model of conditioning adaln_zero and trunk stack."
        )
    known, causal = ~canvas.frames_to_generate, bool(engine.model.config.causal)
    if causal:
        if bool((known[1:] & ~known[:-1]).any()):
            raise ValueError(
                "this model is causal: it cannot attend to known frames after those to be generated; use a model trained "
                "without model.causal, or extend a clip by after=."
            )
        if streams(engine, canvas, options):
            _check_stream(engine, options)
            _check_history_noise(options)
            _warn_of_length(engine, max(frames, canvas.pixels.shape[2]))
    elif options.history_noise is not None:
        raise ValueError(
            f"history_noise={options.history_noise} is for causal models, which remember the frames before; leave it out."
        )
    _warn_of_strategies(engine.trained_on.mask_strategies, canvas, known, causal=causal)
    _warn_of_no_effect(engine, canvas, options, frames=frames)


def _warn_of_no_effect(engine: Engine, canvas: Canvas, options: SamplingOptions, *, frames: int) -> None:
    """Warn of options that change nothing for this canvas."""
    has_known = not bool(canvas.mask.all())
    guidance = engine.guidance(options)
    unguided = guidance.scale == 1
    leads = guidance.guider == "auto" or any(one.guided for one in engine.model.conditioners.values())
    needs = {
        "guider": ("label, caption or actions to lead away from", unguided or leads or engine.guide is not None),
        "history_guidance": ("known frames", has_known),
        "blend": ("known frames", has_known),
        "overlap": ("several windows", canvas.pixels.shape[2] > frames),
        "guidance_interval": ("guidance", not unguided),
        "guidance_channels": ("guidance", not unguided or (has_known and options.history_guidance != 1)),
    }
    defaults = SamplingOptions()
    for name, (needed, is_there) in needs.items():
        if not is_there and getattr(options, name) != getattr(defaults, name):
            warn_user(f"{name}={getattr(options, name)} has no effect without {needed}; leave it out.")


def streams(engine: Engine, canvas: Canvas, options: SamplingOptions) -> bool:
    """Whether a canvas is filled frame by frame: a causal model, a continuation, and known pixels put back unchanged."""
    plain = options.paste and (options.blend == 0 or bool(canvas.mask.all()))
    return bool(engine.model.config.causal) and plain and is_continuation(canvas, engine.vae)


# Options that a stream does not have, because it has neither windows nor the whole clip.
_NOT_STREAMED = ("window", "overlap", "blend", "paste")


def not_streamed(options: SamplingOptions) -> list[str]:
    """The options that are set although a stream does not have them."""
    return [name for name in _NOT_STREAMED if getattr(options, name) != getattr(SamplingOptions(), name)]


def check_streamed(options: SamplingOptions) -> None:
    """Raise ValueError for options that a stream does not have."""
    if changed := not_streamed(options):
        raise ValueError(f"a stream takes no {' and no '.join(changed)}; leave them out, or use extend.")


def check_world(engine: Engine, options: SamplingOptions) -> Actions:
    """The condition on actions of a model that can be acted in; ValueError, in one line, if it cannot."""
    if not engine.model.config.causal:
        raise ValueError(
            "a world goes on frame by frame, but this model is not causal; train one with model.causal=true (configs/room.yaml)."
        )
    condition = engine.model.conditioners.get(Actions.name)
    if not isinstance(condition, Actions):
        raise ValueError(
            "this model takes no actions; train one with model.actions=true on clips that have them (stdit record)."
        )
    if not engine.vae.resumable:
        raise ValueError(
            f"VAE {engine.vae.name!r} decodes whole clips only, so a world cannot be shown as it goes on; use tiny."
        )
    check_streamed(options)
    _check_guidance(engine, options)
    _check_shift(engine, options)
    trained = engine.trained_on
    _check_solver(engine, options, engine.latent_shape((trained.num_frames, trained.height, trained.width)))
    _check_stream(engine, options)
    _check_history_noise(options)
    _warn_of_length(engine, None)
    return condition


def check_conditions(conditioners: Mapping[str, Conditioner], conditions: Conditions, frames: int, stride: int) -> None:
    """Raise ValueError for a condition whose number of values does not fit an output of `frames` pixel frames."""
    for name, value in conditions.items():
        conditioners[name].check_frames(value, frames, stride)


def warn_of_conditions(
    canvas: Canvas,
    guidance_scale: float,
    conditioners: Mapping[str, Conditioner],
    given: Mapping[str, Any],
    *,
    guider: str | None = None,
) -> None:
    """Warn if known frames have no label to go with, or negative conditions have no effect.

    given: conditions of the call, by keyword. guider: that of the call, None if it names none.
    """
    said = {keyword for keyword, value in given.items() if value is not None}
    alone = "label" in conditioners and not said & {conditioner.keywords[0] for conditioner in conditioners.values()}
    if alone and not canvas.mask.all():
        warn_user(
            "this model has classes, but no label is given for the known frames: what is generated next to them may be of "
            "another class; give the class of what they show, class_labels= (--class-label)."
        )
    if guider == "auto" and any(keyword.startswith(NEGATIVE) for keyword in said):
        warn_user(
            "negative conditions have no effect with guider='auto', which leads away from a weaker model; use cfg."
        )
    if guidance_scale == 1 and any(keyword.startswith(NEGATIVE) for keyword in said):
        warn_user("negative conditions have no effect at guidance_scale=1 (--guidance 1); raise it, or leave them out.")


def _check_channels(engine: Engine, options: SamplingOptions) -> None:
    channels, guided_channels = engine.vae.channels, options.guidance_channels
    if guided_channels is not None and guided_channels > channels:
        raise ValueError(
            f"guidance_channels (--guidance-channels) must be 1 to {channels}, the latents' channels, got {guided_channels}."
        )


def _check_guidance(engine: Engine, options: SamplingOptions) -> None:
    if engine.learnt_guidance is not None:
        _check_learnt(engine, options)
        return
    if engine.distilled_guidance != 1 and (options.guidance_scale not in (None, 1) or options.guider == "auto"):
        given = (
            "guider='auto'"
            if options.guidance_scale in (None, 1)
            else f"guidance_scale={options.guidance_scale} (--guidance)"
        )
        raise ValueError(
            f"{given} on top of the {exact(engine.distilled_guidance)} that this model has learnt; leave it out, as --guidance 1 does."
        )
    if options.guider == "auto" and engine.guide is None:
        remedy = "" if engine.model.config.causal else ", or train with train.guide_step=STEP, which saves one"
        raise ValueError(
            f"guider='auto' leads away from a weaker model, which this one does not have; leave it out{remedy}."
        )


def check_learnt_guidance(given: Mapping[str, Any]) -> None:
    """Raise ValueError for conditions of a call that a model which has learnt scales of guidance would not heed."""
    negative = [key for key, value in given.items() if value is not None and key.startswith(NEGATIVE)]
    if negative:
        raise ValueError(
            f"{negative[0]} has no effect on a model that has learnt guidance, which leads away from no condition; leave it out, or "
            "sample its teacher."
        )
    if given.get("guidance_scales") is not None:
        raise ValueError(
            "guidance_scales is for calls of the network; give guider= and guidance_scale= in place of it."
        )


def _check_learnt(engine: Engine, options: SamplingOptions) -> None:
    """Raise ValueError for a guider, a scale or levels that a model which takes scales as a condition has not learnt."""
    assert engine.learnt_guidance is not None
    guidance = engine.guidance(options)
    engine.learnt_guidance.at_scale(guidance.guider, guidance.scale)
    if options.guidance_interval is not None or guidance.channels is not None:
        raise ValueError(
            "guidance_interval and guidance_channels (--guidance-interval, --guidance-channels) are for guidance by a second "
            "evaluation, and this model has learnt guidance; leave them out."
        )


def _check_solver(engine: Engine, options: SamplingOptions, latent_shape: tuple[int, int, int]) -> None:
    name = options.solver or engine.default_solver
    least = pick(SOLVERS, name, "solver").least_steps(engine.objective.path)
    if _count_steps(engine, options, latent_shape) < least:
        raise ValueError(
            f"solver {name!r} needs at least {least} steps, got num_inference_steps={options.num_inference_steps} (--steps); use euler, "
            "or more steps."
        )
    if name == "flow_map" and not getattr(engine.model.config, "flow_map", False):
        raise ValueError(
            "solver 'flow_map' needs a model that was trained with objective.flow_map=true; use euler, ab2 or dpmpp_2m, or train "
            "one (configs/quickstart_few.yaml)."
        )


def _count_steps(engine: Engine, options: SamplingOptions, latent_shape: tuple[int, int, int]) -> int:
    """The steps that a frame takes, however their number is written."""
    return len(engine.schedule(options, latent_shape)) - 1


def _check_shift(engine: Engine, options: SamplingOptions) -> None:
    objective = engine.objective.config.name
    if options.shift is not None and objective != "flow":
        raise ValueError(
            f"shift={options.shift} (--shift) moves the levels of flow, but this model was trained with {objective}; leave it out."
        )


def _check_stagger(engine: Engine, options: SamplingOptions, latent_shape: tuple[int, int, int]) -> None:
    if options.stagger == 1:
        return
    steps = _count_steps(engine, options, latent_shape)
    if options.stagger > steps:
        raise ValueError(
            f"stagger={options.stagger} is more than the {steps} steps of a frame, so that frames would only wait; give 1 to {steps}."
        )


def _check_scheduler(
    engine: Engine, canvas: Canvas, options: SamplingOptions, latent_shape: tuple[int, int, int]
) -> None:
    if not engine.uses_diffusers(options.solver):
        return _check_solver(engine, options, latent_shape)
    name = type(engine.scheduler).__name__
    if not canvas.mask.all() or canvas.strength != 1 or options.arrangement != "together":
        raise ValueError(
            f"this task needs a noise level per frame, which only stdit's solvers have; this model has scheduler {name}: add "
            "solver='ddim' (--solver ddim)."
        )
    if options.shift is not None:
        raise ValueError(
            f"shift={options.shift} (--shift) is for stdit's solvers, but this model has scheduler {name}; leave it out, or add "
            "solver='euler' (--solver euler)."
        )
    if isinstance(options.num_inference_steps, str):
        raise ValueError(
            f"num_inference_steps={options.num_inference_steps!r} is for stdit's solvers, but this model has scheduler {name}; "
            "use a number, or add solver='ddim' (--solver ddim)."
        )


def _check_stream(engine: Engine, options: SamplingOptions) -> None:
    """Raise ValueError for options that do not apply when frames are generated one by one with a cache."""
    defaults = SamplingOptions()
    names = ("history_guidance", "arrangement", "tile")
    changed = [
        f"{name}={getattr(options, name)}" for name in names if getattr(options, name) != getattr(defaults, name)
    ]
    if options.guidance_interval not in (None, (0.0, 1.0)):
        changed.append(f"guidance_interval={options.guidance_interval}")
    changed += ["guider=auto"] if options.guider == "auto" and engine.learnt_guidance is None else []
    if changed:
        raise ValueError(
            f"a causal model generates frame by frame, to which these options do not apply: leave out {', '.join(changed)}, or "
            "use a model trained without model.causal."
        )


def _check_history_noise(options: SamplingOptions) -> None:
    if options.history_noise is not None and options.history_noise >= 1:
        raise ValueError(
            f"history_noise={options.history_noise} would leave nothing of the frames before; use 0 to 0.5."
        )


def _warn_of_length(engine: Engine, frames: int | None) -> None:
    """Warn of more frames (None: a world, which has no end) than a model without a window can attend to."""
    trained = engine.trained_on.num_frames
    if engine.model.config.window is None and (frames is None or frames > trained):
        longer = "in a world without end" if frames is None else f"for {frames}"
        warn_user(
            f"this causal model was trained on {trained} frames without a window: {longer} its cache grows with every "
            "frame, and it attends further back than in training; train with model.window for long clips."
        )


def _warn_of_strategies(trained: tuple[str, ...], canvas: Canvas, known: Tensor, *, causal: bool) -> None:
    """Warn if frames or patches are known where no mask strategy of training had known ones."""
    if canvas.mask.all() or not canvas.mask.any():
        return
    gaps = int((known[:-1] & ~known[1:]).sum())
    if canvas.mask.shape[1] > 1:
        fitting = ["region"]
    elif causal or (known[0] and not known[-1]):
        fitting = ["prefix", "motion", "random", "teacher_forcing"]
    elif known[-1] and not known[0]:
        fitting = ["suffix", "random"]
    elif not known[0]:
        fitting = ["random"]
    else:
        fitting = ["ends" if gaps == 1 else "every_kth", "random"]
    if canvas.mask.shape[1] == 1:
        fitting.append("per_frame")  # in training with it, any frame may be cleaner than any other
    if not set(fitting) & set(trained):
        warn_user(
            f"this model was trained with objective.mask_strategy={', '.join(trained)} but never with known frames where this "
            f"task has them (as in {' or '.join(fitting)}): expect seams; train with objective.mask_strategy=mixed."
        )

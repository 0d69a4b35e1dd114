"""The scheduler that a pipeline stores: the objective of its training, and its default solver."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from stdit.diffusion.objective import Objective, ObjectiveConfig, build_objective
from stdit.diffusion.paths import DDPMPath


class STDiTScheduler(SchedulerMixin, ConfigMixin):
    """Selects stdit's solvers, with a noise level per frame; any diffusers scheduler may take its place in a pipeline.

    solver: a row of `solvers.SOLVERS`; by default euler for flow, ddpm for DDPM.
    """

    @register_to_config
    def __init__(
        self,
        objective: str = "flow",
        shift: float = 1.0,
        shift_tokens: int = 0,
        solver: str | None = None,
        betas: str = "linear",
        learn_sigma: bool = True,
    ):
        self.objective: Objective = build_objective(
            ObjectiveConfig(
                name=objective, shift=shift, shift_tokens=shift_tokens, betas=betas, learn_sigma=learn_sigma,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        self.solver = solver or ("ddpm" if objective == "ddpm" else "euler")


def check_compatible(scheduler: SchedulerMixin, objective: str, trained: STDiTScheduler | None = None) -> None:
    """Raise ValueError if a diffusers scheduler reads the output or the noise levels in another way than training did.

    trained: stdit's scheduler of the model, if it is known, with the noise levels of training.
    """
    name, config = type(scheduler).__name__, scheduler.config
    predicts = "flow_prediction" if name.startswith("FlowMatch") else config.get("prediction_type")
    flow_sigmas = name.startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
    expected = {"flow": "flow_prediction", "ddpm": "epsilon"}[objective]
    steps = config.get("num_train_timesteps", 1000)
    wrong = ""
    if predicts != expected:
        wrong = f"expects prediction_type={predicts!r}"
    elif flow_sigmas != (objective == "flow"):
        wrong = f"has use_flow_sigmas={flow_sigmas}"
    elif "sigma_data" in config:
        wrong = "has the noise levels of EDM"
    elif steps != 1000:
        wrong = f"has num_train_timesteps={steps}"
    elif objective == "ddpm" and trained is not None and not _same_levels(scheduler, trained):
        wrong = f"has other betas ({config.get('beta_schedule')})"
    if wrong:
        raise ValueError(
            f"{name} {wrong}, but this model was trained for {objective!r}; build it with {_remedy(objective, trained)}."
        )


def _same_levels(scheduler: SchedulerMixin, trained: STDiTScheduler) -> bool:
    """Whether the chain of a diffusers scheduler is that of training."""
    theirs = getattr(scheduler, "alphas_cumprod", None)
    path = trained.objective.path
    if theirs is None or not isinstance(path, DDPMPath):
        return True
    ours = path.alpha_bar[1:].to(theirs)
    return len(ours) == len(theirs) and bool((ours - theirs).abs().max() < 1e-3)


def _remedy(objective: str, trained: STDiTScheduler | None) -> str:
    """Arguments with which a diffusers scheduler fits."""
    if objective == "flow":
        return "prediction_type='flow_prediction', use_flow_sigmas=True, or use a FlowMatch scheduler"
    remedy = "prediction_type='epsilon', num_train_timesteps=1000"
    if trained is not None and isinstance(trained.objective.path, DDPMPath):
        first, last, power = trained.objective.path.betas
        schedule = "linear" if power == 1 else "scaled_linear"
        remedy += f", beta_schedule={schedule!r}, beta_start={first}, beta_end={last}"
    return remedy

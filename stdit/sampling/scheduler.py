"""The scheduler that a pipeline stores: the objective of its training, and its default solver."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from stdit.diffusion.objective import Objective, ObjectiveConfig, build_objective


class STDiTScheduler(SchedulerMixin, ConfigMixin):
    """Selects stdit's solvers, with a noise level per frame; any diffusers scheduler may take its place in a pipeline.

    solver: euler, heun, ddim or ddpm; by default euler for flow, ddpm for DDPM.
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


def check_compatible(scheduler: SchedulerMixin, objective: str) -> None:
    """Raise ValueError if a diffusers scheduler expects another prediction than the model was trained for."""
    name = type(scheduler).__name__
    predicts = scheduler.config.get("prediction_type", "flow_prediction" if "FlowMatch" in name else "epsilon")
    expected = {"flow": "flow_prediction", "ddpm": "epsilon"}[objective]
    if predicts != expected:
        remedy = (
            "prediction_type='flow_prediction', use_flow_sigmas=True"
            if objective == "flow"
            else "prediction_type='epsilon'"
        )
        raise ValueError(
            f"{name} expects prediction_type={predicts!r}, but this model was trained for {objective!r}; build it with {remedy}."
        )

"""What training changes: weights, their moving average, further averages, optimizers; how it is kept, and swapped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from stdit.legacy import renamed_parameter
from stdit.nn.low_rank import is_low_rank
from stdit.training.averages import PowerAverages
from stdit.training.compiled import uncompiled
from stdit.training.parallel import like, local, local_parameters, reshard, trained_parameters
from stdit.training.shard_files import part_of
from stdit.training.state import Checkpoint, flatten_optimizer, restore_optimizer


class LoopState(NamedTuple):
    """The objects that training changes."""

    model: nn.Module
    ema: EMAModel
    averages: PowerAverages
    optimizers: list

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Groups of tensors for a checkpoint."""
        parameters = trained_parameters(self.model)
        shadows = zip(parameters, self.ema.shadow_params, strict=True)
        states = {f"optimizer_{i}": flatten_optimizer(one)[0] for i, one in enumerate(self.optimizers)}
        return {
            "model": saved_weights(self.model),
            "ema": {name: like(shadow, parameters[name]) for name, shadow in shadows},
            **states,
            **self.averages.state(self.model),
        }

    def info(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        numbers = [flatten_optimizer(optimizer)[1] for optimizer in self.optimizers]
        return {"optimizers": numbers, "ema_step": self.ema.optimization_step}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load what `tensors` and `info` gave; ValueError if it is of another model."""
        tensors, info = checkpoint.tensors, checkpoint.info
        load_weights(self.model, tensors["model"], str(checkpoint.path))
        saved = {renamed_parameter(name): name for name in tensors["ema"]}
        for shadow, (name, p) in zip(self.ema.shadow_params, trained_parameters(self.model).items(), strict=True):
            shadow.data.copy_(local(part_of(tensors["ema"], saved[name], p)))
        self.ema.optimization_step = info["ema_step"]
        run = info.get("config", {}).get("train", {})
        self.averages.restore(self.model, tensors, run.get("average_lengths", []))
        for i, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, tensors.get(f"optimizer_{i}", {}), info["optimizers"][i])


def saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that checkpoints hold: all, or of a model with LoRAs those alone, since the others stay as they are."""
    state = dict(model.state_dict())
    return {name: value for name, value in state.items() if is_low_rank(name)} or state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load what `saved_weights` gave, a tensor at a time, since the rest may still be in files.

    ValueError if it does not fit the model, which has some of it then. origin: what it is from, for the message.
    """
    places = saved_weights(model)
    names = {renamed_parameter(name): name for name in weights}
    try:
        if odd := sorted(names.keys() ^ places.keys()):
            raise RuntimeError(f"{len(odd)} weights differ, such as {odd[0]}")
        for name, place in places.items():
            part = part_of(weights, names[name], place)
            if part.shape != place.shape:
                raise RuntimeError(f"{name} has the shape {list(part.shape)} instead of {list(place.shape)}")
            local(place).copy_(local(part))
    except RuntimeError as error:  # with allow_changes
        raise ValueError(
            f"{origin} does not fit the model of this config: {' '.join(str(error).split())[:300]}; choose another "
            "name=, or start from its weights with init_from."
        ) from error


class swap_ema:
    """A context manager in which the model has the averaged weights, is in evaluation mode, and shares no frames.

    Compiled blocks run as they are.
    """

    def __init__(self, model: nn.Module, ema: EMAModel):
        self.model, self.ema = model, ema

    def __enter__(self) -> None:
        self._context_parallel = getattr(self.model, "context_parallel", None)
        if self._context_parallel is not None:
            self.model.context_parallel = None  # type: ignore[assignment]
        self.ema.store(local_parameters(self.model))
        self.ema.copy_to(local_parameters(self.model))
        self.model.eval()
        self._uncompiled = uncompiled(self.model)  # last, since it holds for the whole process
        self._uncompiled.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._uncompiled.__exit__(*error)
        reshard(self.model)  # averaged weights that were gathered for a forward pass must not serve in training
        self.ema.restore(local_parameters(self.model))
        if self._context_parallel is not None:
            self.model.context_parallel = self._context_parallel
        self.model.train()

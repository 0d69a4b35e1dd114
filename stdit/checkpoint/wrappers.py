"""Names of parameters without the prefixes that wrappers of a model add to them."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# What torch.compile, FSDP and activation checkpointing put anywhere into a name, since they wrap submodules too.
_ANYWHERE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DDP, DeepSpeed, Lightning, EMA wrappers and training scripts put in front of every name.
_IN_FRONT = ("module", "model", "ema_model", "ema", "net", "network", "transformer", "diffusion_model", "state_dict")
# Prefixes of the averaged weights, in a file that holds the same model twice.
_AVERAGED = ("ema_model.", "ema.", "model_ema.")
# Counters that averages store next to the weights.
_COUNTERS = ("n_averaged", "num_updates", "initted", "step", "decay")


def unwrapped(tensors: Mapping[str, Tensor], which: str = "ema") -> dict[str, Tensor]:
    """The tensors under the names of the model itself: wrappers' prefixes come off, nested ones too.

    which: "ema" or "model", where a file holds averaged and plain weights under prefixes of their own. Prefixes that
    only some of the names have are left, as they are parts of the model.
    """
    tensors = {_ANYWHERE.sub("", key): value for key, value in tensors.items()}
    while True:
        averaged = _prefix(tensors, _AVERAGED)
        plain = _prefix(tensors, [f"{name}." for name in _IN_FRONT])
        weights = [key for key in tensors if key.rpartition(".")[2] not in _COUNTERS]
        if averaged and averaged != plain and plain and _all_start(weights, (averaged, plain)):
            chosen = averaged if which == "ema" else plain
            tensors = {key: value for key, value in tensors.items() if key.startswith(chosen)}
        elif not plain or not _all_start(weights, (plain,)):
            return tensors
        else:
            chosen = plain
        tensors = {key.removeprefix(chosen): value for key, value in tensors.items() if key.startswith(chosen)}


def _prefix(names: Iterable[str], prefixes: Iterable[str]) -> str | None:
    """The first of the prefixes that a name has."""
    return next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)


def _all_start(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return all(name.startswith(prefixes) for name in names)

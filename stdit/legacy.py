"""Names of version 0.1.0 and their current names. Old names work for one more version, with one warning each."""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from stdit.warn import warn_user

# Modules that moved. `import stdit.keys` gives `stdit.rng`.
MODULES = {
    "stdit.keys": "stdit.rng",
    "stdit.sources": "stdit.hub",
    "stdit.prompt": "stdit.conditions",
    "stdit.nn.matrices": "stdit.nn.muon",
    "stdit.nn.joint": "stdit.nn.dual_stream",
    "stdit.model.told": "stdit.model.conditioning",
    "stdit.model.sockets": "stdit.model.hub_mixin",
    "stdit.model.trunks.joint": "stdit.model.trunks.dual_stream",
    "stdit.sampling.place": "stdit.sampling.conditioning",
    "stdit.sampling.plan": "stdit.sampling.schedule",
    "stdit.sampling.rollout": "stdit.sampling.autoregressive",
    "stdit.sampling.sampler": "stdit.sampling.windowed",
    "stdit.training.record": "stdit.training.metrics",
    "stdit.data.order": "stdit.data.samplers",
}

# Names that changed inside a module (under its current path), resolved by the `__getattr__` that `aliases` makes.
NAMES = {
    "stdit.text": {"Words": "HashedWordEncoder", "Pretrained": "TransformersTextEncoder"},
    "stdit.training.metrics": {"Record": "MetricsLogger"},
    "stdit.training.fit": {"averaged": "swap_ema"},
    "stdit.sampling.windowed": {"Sampler": "WindowedSampler"},
    "stdit.sampling.pipeline": {"_label": "label_number"},
    "stdit.data.samplers": {
        "Uniform": "UniformSampler", "Buckets": "BucketSampler", "Packs": "PackedSampler", "Size": "ClipSize",
        "Slot": "SampleRef", "Order": "BatchSampler", "assign": "assign_buckets",
    },
    "stdit.data.inputs": {"Size": "ImageSize"},
    "stdit.vae.adapters": {"Kind": "VAESpec", "KINDS": "VAE_SPECS"},
    "stdit.vae.base": {"each_frame": "split_frames"},
    "stdit.vae.tiny": {"Past": "CausalConvCache", "each_group": "per_group"},
}  # fmt: skip

# Keys of configs (a run's YAML and overrides, the config in a checkpoint) and of a model's config.json, by section.
CONFIG_KEYS = {
    "model": {
        "time_entry": "position_encoding", "positions": "pos_scaling", "learned_places": "learned_pos_embed",
        "place_bias": "relative_position_bias", "time_mlp": "timestep_mlp", "conditions": "micro_conditions",
        "decode_depth": "num_decoder_blocks", "single_depth": "num_single_blocks", "clock_scale": "timestep_scale",
        "clock_reversed": "timestep_reversed", "clock_offset": "timestep_offset", "gelu": "activation",
    },
    "objective": {
        "scheme": "mask_strategy", "shares": "mask_probs", "mixed_from": "mask_warmup_steps", "known_noise": "cond_noise_max",
        "known_shift": "cond_timestep_shift",
    },
    "pipeline": {"schemes": "mask_strategies"},
}  # fmt: skip

# Values that changed, by section and (new) key.
_STRATEGIES = {"teacher": "teacher_forcing", "every": "every_kth"}
CONFIG_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "model": {
        "position_encoding": {
            "attention": "sincos", "rotary": "rope", "rotary_3d": "rope_3d", "attention_rotary_3d": "sincos+rope_3d",
            "stream": "latte",
        },
        "pos_scaling": {"extrapolate": "none"},
        "trunk": {"joint": "dual_stream"},
        "activation": {"tanh": "gelu_tanh", "none": "gelu", "exact": "gelu"},
    },
    "objective": {"mask_strategy": _STRATEGIES, "mask_probs": _STRATEGIES},
    "pipeline": {"mask_strategies": _STRATEGIES},
}  # fmt: skip

# Prefixes and parts of parameter names, in the order in which they are replaced.
PARAMETERS = (
    ("wiring.side.", "trunk.side_interpolater."),
    ("wiring.places.", "trunk.decoder_pos_embed."),
    ("wiring.token", "trunk.mask_token"),
    ("wiring.pooled_embedder.", "trunk.pooled_embedder."),
    ("wiring.", "trunk."),
    ("pos_embed.extras", "pos_embed.prefix"),
    ("info_embedder.each.", "micro_embedder.embedders."),
    ("info_embedder.", "micro_embedder."),
    (".adaLN_modulation.own.", ".adaLN_modulation.lora."),
    (".place_bias.", ".relative_position_bias."),
)

_warned: set[str] = set()


def warn_renamed(*renames: tuple[str, str]) -> None:
    """Warn, once for each (old name, new name), that the old name works for one more version only."""
    new = {old: name for old, name in renames if old not in _warned}
    _warned.update(new)
    if new:
        listed = ", ".join(f"{old!r} is now called {name!r}" for old, name in new.items())
        warn_user(f"{listed}; old names work for one more version.")


def renamed_section(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a section of a config to the current keys and values, with a warning for each old one.

    Raises ValueError if a setting is given under both its old and its new key.
    """
    keys, values = CONFIG_KEYS.get(section, {}), CONFIG_VALUES.get(section, {})
    prefix = "" if section == "pipeline" else f"{section}."
    found: dict[str, Any] = {}
    renames: list[tuple[str, str]] = []
    for key, value in given.items():
        name = keys.get(key, key)
        if name != key:
            if name in given:
                raise ValueError(
                    f"{prefix}{key} and {prefix}{name} are two names of one setting, but both are given; leave out {prefix}{key}."
                )
            renames.append((f"{prefix}{key}", f"{prefix}{name}"))
        found[name] = _renamed_value(values.get(name, {}), value, f"{prefix}{name}", renames)
    warn_renamed(*renames)
    return found


def _renamed_value(table: Mapping[str, str], value: Any, key: str, renames: list[tuple[str, str]]) -> Any:
    if isinstance(value, Mapping):
        return {_renamed_value(table, name, key, renames): each for name, each in value.items()}
    if isinstance(value, list):
        return [_renamed_value(table, each, key, renames) for each in value]
    if isinstance(value, str) and value in table:
        renames.append((f"{key}={value}", f"{key}={table[value]}"))
        return table[value]
    return value


def renamed_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a whole config of a run (nested mappings) to the current keys and values."""
    sections = {**CONFIG_KEYS, **CONFIG_VALUES}
    return {
        key: renamed_section(key, value) if key in sections and isinstance(value, Mapping) else value
        for key, value in given.items()
    }


def renamed_parameter(name: str) -> str:
    """The current name of a parameter, given its old or its current name."""
    for old, new in PARAMETERS:
        if old in name and (old.startswith(".") or name.startswith(old)):
            name = name.replace(old, new, 1)
    return name


def accept_old_keywords(section: str) -> Callable:
    """A decorator for a constructor, which then accepts the keywords and values of version 0.1.0 too."""

    def decorate(init: Callable) -> Callable:
        @functools.wraps(init)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            return init(self, *args, **renamed_section(section, kwargs))

        return wrapped

    return decorate


def aliases(module: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of a module, which resolves its old names in `NAMES` with a warning."""

    def find(name: str) -> Any:
        new = NAMES.get(module, {}).get(name)
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed((f"{module}.{name}", f"{module}.{new}"))
        return getattr(sys.modules[module], new)

    return find


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules that moved: an old path gives the same module object as the new one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find the old paths of `MODULES` only."""
        return importlib.util.spec_from_loader(name, self) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Warn that the module moved; Python then creates an empty module, which `exec_module` replaces."""
        warn_renamed((spec.name, MODULES[spec.name]))

    def exec_module(self, module: ModuleType) -> None:
        """Import the module under its new path, and register it under the old path."""
        sys.modules[module.__name__] = importlib.import_module(MODULES[module.__name__])


def install() -> None:
    """Make the old module paths importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
